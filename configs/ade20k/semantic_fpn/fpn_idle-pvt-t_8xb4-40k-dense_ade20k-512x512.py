_base_ = [
    '../../_base_/models/semantic-fpn.py',
    '../../_base_/datasets/ade20k_multiples.py',
    '../../_base_/schedules/schedule_40k_pvt.py',
    '../../_base_/default_runtime_seg.py',
]

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_tiny.pth'
model = dict(
    backbone=dict(
        type='IdlePyramidVisionTransformer',
        num_layers=[2, 2, 2, 2],
        keep_ratios=1.0,
        policy=dict(scorer='mean_distance', scope='map'),
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
