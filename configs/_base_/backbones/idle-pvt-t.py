# A config takes it as `_base_.idle_pvt_t`: mmengine refuses the key `model` in two bases.
checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_tiny.pth'
idle_pvt_t = dict(
    type='IdlePyramidVisionTransformer',
    num_layers=[2, 2, 2, 2],
    keep_ratios=1.0,
    policy=dict(scorer='mean_distance', scope='map'),
    convert_weights=True,
    init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
)
