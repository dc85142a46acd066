_base_ = './upernet_idle-swin_digits.py'

model = dict(backbone=dict(keep_ratios=1.0))
