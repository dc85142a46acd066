_base_ = '../retinanet_idle-swin_finetune_digits.py'

model = dict(backbone=dict(keep_ratios=0.63, policy=dict(scorer='learned')))
