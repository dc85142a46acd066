_base_ = '../retinanet_idle-swin_finetune_digits.py'

model = dict(backbone=dict(keep_ratios=0.56, policy=dict(_delete_=True, type='EvoViT')))
