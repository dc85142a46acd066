_base_ = './mask2former_idle-swin-l_8xb2-160k-keep70_ade20k-640x640.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
