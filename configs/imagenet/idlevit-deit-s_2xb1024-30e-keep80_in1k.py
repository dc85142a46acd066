_base_ = './idlevit-deit-s_2xb1024-30e-keep70_in1k.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.8)))
