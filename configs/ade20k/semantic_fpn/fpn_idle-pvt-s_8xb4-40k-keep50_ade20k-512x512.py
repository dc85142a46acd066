_base_ = './fpn_idle-pvt-s_8xb4-40k-keep70_ade20k-512x512.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
