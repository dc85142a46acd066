_base_ = './fpn_idle-pvtv2_digits.py'

model = dict(backbone=dict(keep_ratios=1.0))
