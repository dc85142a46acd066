# A config takes it as `_base_.idle_swin_t`: mmengine refuses the key `model` in two bases.
idle_swin_t = dict(
    type='IdleSwinTransformer',
    embed_dims=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    mlp_ratio=4,
    qkv_bias=True,
    qk_scale=None,
    drop_rate=0.0,
    attn_drop_rate=0.0,
    patch_norm=True,
    out_indices=(0, 1, 2, 3),
    keep_ratios=1.0,
    policy=dict(scorer='mean_distance', scope='map'),
)
