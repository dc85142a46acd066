_base_ = [
    '../../_base_/backbones/idle-pvt-t.py',
    '../../_base_/models/retinanet_fpn.py',
    '../../_base_/datasets/coco_detection.py',
    '../../_base_/schedules/schedule_1x.py',
    '../../_base_/default_runtime_det.py',
]

model = dict(backbone={{_base_.idle_pvt_t}}, neck=dict(in_channels=[64, 128, 320, 512]))
