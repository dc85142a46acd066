_base_ = '../retinanet_idle-swin_finetune_digits.py'

model = dict(backbone=dict(keep_ratios=0.53, policy=dict(_delete_=True, type='SparseViT')))
# SparseViT's sparsity-aware adaptation: one checkpoint learns to serve many ratios.
custom_hooks = [dict(type='RandomKeepRatioHook', low=0.3, high=1.0, per='block', descending=True)]
