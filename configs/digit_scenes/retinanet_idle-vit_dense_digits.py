_base_ = './retinanet_idle-vit_digits.py'

model = dict(backbone=dict(keep_ratios=1.0))
