_base_ = [
    '../../_base_/models/mask-rcnn_idle-swin-t_fpn.py',
    '../../_base_/datasets/coco_instance.py',
    '../../_base_/schedules/schedule_1x_swin.py',
    '../../_base_/default_runtime_det.py',
]
