# Sized for two cores; a config takes it by name, as mmengine refuses `model` in two bases.
idle_pvtv2 = dict(
    type='IdlePyramidVisionTransformerV2',
    embed_dims=32,
    num_layers=[2, 2, 2, 2],
    num_heads=[1, 2, 4, 8],
    sr_ratios=[4, 2, 1, 1],
    mlp_ratios=[4, 4, 4, 4],
    drop_path_rate=0.0,
    keep_ratios=0.7,
    policy=dict(scorer='mean_distance', scope='map'),
)
