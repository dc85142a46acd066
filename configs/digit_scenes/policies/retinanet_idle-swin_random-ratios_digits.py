_base_ = '../retinanet_idle-swin_finetune_digits.py'

# One checkpoint for many ratios: test it with --cfg-options model.backbone.keep_ratios=0.5.
custom_hooks = [dict(type='RandomKeepRatioHook', low=0.3, high=1.0, per='model')]
