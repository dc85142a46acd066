_base_ = [
    '../../_base_/backbones/idle-pvtv2-b0.py',
    '../../_base_/models/retinanet_fpn.py',
    '../../_base_/datasets/coco_detection.py',
    '../../_base_/schedules/schedule_1x.py',
    '../../_base_/default_runtime_det.py',
]

model = dict(backbone={{_base_.idle_pvtv2_b0}}, neck=dict(in_channels=[32, 64, 160, 256]))
