_base_ = [
    '../../_base_/models/mask-rcnn_idle-swin-t_fpn.py',
    '../../_base_/datasets/coco_instance_ms-crop.py',
    '../../_base_/schedules/schedule_3x_swin.py',
    '../../_base_/default_runtime_det.py',
]

optim_wrapper = dict(type='AmpOptimWrapper')
