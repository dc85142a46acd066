_base_ = [
    '../../_base_/backbones/idle-pvt-t.py',
    '../../_base_/models/semantic-fpn.py',
    '../../_base_/datasets/ade20k_multiples.py',
    '../../_base_/schedules/schedule_40k_pvt.py',
    '../../_base_/default_runtime_seg.py',
]

model = dict(backbone={{_base_.idle_pvt_t}}, neck=dict(in_channels=[64, 128, 320, 512]))
