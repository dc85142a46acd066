_base_ = './mask-rcnn_idle-swin_digits.py'

model = dict(backbone=dict(keep_ratios=1.0))
