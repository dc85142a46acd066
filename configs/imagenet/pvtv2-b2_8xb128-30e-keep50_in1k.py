_base_ = './pvtv2-b2_8xb128-30e-keep70_in1k.py'

model = dict(backbone=dict(keep_ratios=0.5))
