# A config takes it as `_base_.idle_pvtv2_b0`: mmengine refuses the key `model` in two bases.
checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b0.pth'
idle_pvtv2_b0 = dict(
    type='IdlePyramidVisionTransformerV2',
    embed_dims=32,
    num_layers=[2, 2, 2, 2],
    keep_ratios=1.0,
    policy=dict(scorer='mean_distance', scope='map'),
    convert_weights=True,
    init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
)
