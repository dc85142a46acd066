# Sized for two cores; a config takes it by name, as mmengine refuses `model` in two bases.
idle_vit = dict(
    type='IdleVisionTransformer',
    img_size=128,
    patch_size=8,
    embed_dims=96,
    num_layers=8,
    num_heads=3,
    # Two dense blocks, then two each with 0.7, 0.7 ** 2 and 0.7 ** 3 of the tokens.
    keep_ratios=dict(type='powers', keep_ratio=0.7, first_idle=2),
    policy=dict(type='IdleViT', scorer='class_query'),
)
# The map of stride 8 becomes maps of stride 4, 8 and 16; the fourth is every second pixel.
simple_pyramid = dict(
    type='SimpleFeaturePyramid',
    in_channels=96,
    out_channels=64,
    scale_factors=[2.0, 1.0, 0.5],
    num_outs=4,
)
# Besides what does not decay in a pyramid.
idle_vit_decay = dict(
    norm_decay_mult=0.0,
    custom_keys={'pos_embed': dict(decay_mult=0.0), 'cls_token': dict(decay_mult=0.0)},
)
