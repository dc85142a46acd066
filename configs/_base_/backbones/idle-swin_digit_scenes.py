# Sized for two cores; a config takes it by name, as mmengine refuses `model` in two bases.
idle_swin = dict(
    type='IdleSwinTransformer',
    embed_dims=32,
    depths=[2, 2, 2, 2],
    num_heads=[2, 4, 8, 16],
    window_size=4,
    drop_path_rate=0.0,
    keep_ratios=0.7,
    policy=dict(scorer='mean_distance', scope='map'),
)
