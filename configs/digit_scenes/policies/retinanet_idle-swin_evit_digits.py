_base_ = '../retinanet_idle-swin_finetune_digits.py'

# Each stage begins by dropping tokens; its other blocks go on with those still in play.
model = dict(backbone=dict(keep_ratios=[[0.56, 1.0]] * 4, policy=dict(_delete_=True, type='EViT')))
custom_hooks = [dict(type='KeepRatioWarmupHook', end=1, convert_to_iter_based=True)]
