_base_ = './evit-deit-s_8xb128-300e-keep70_in1k.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
