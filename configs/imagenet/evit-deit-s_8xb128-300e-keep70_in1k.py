_base_ = './deit-s_8xb128-300e_in1k.py'

model = dict(
    backbone=dict(
        keep_ratios=dict(type='evit', keep_ratio=0.7, blocks=[3, 6, 9]),
        policy=dict(type='EViT', scorer='class_attention', fuse=True),
    )
)
# From epoch 10 on, over 100 epochs, the ratio falls in every iteration.
custom_hooks = [dict(type='KeepRatioWarmupHook', begin=10, end=110, convert_to_iter_based=True)]
