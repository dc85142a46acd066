_base_ = [
    '../../_base_/backbones/idle-pvtv2-b0.py',
    '../../_base_/models/semantic-fpn.py',
    '../../_base_/datasets/ade20k_multiples.py',
    '../../_base_/schedules/schedule_40k_pvt.py',
    '../../_base_/default_runtime_seg.py',
]

model = dict(backbone={{_base_.idle_pvtv2_b0}}, neck=dict(in_channels=[32, 64, 160, 256]))
