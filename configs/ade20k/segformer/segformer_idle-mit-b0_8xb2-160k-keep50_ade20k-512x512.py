_base_ = './segformer_idle-mit-b0_8xb2-160k-keep70_ade20k-512x512.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
