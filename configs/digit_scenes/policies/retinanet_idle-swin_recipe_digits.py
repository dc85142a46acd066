_base_ = './retinanet_idle-swin_distill_digits.py'

# About a third of the backbone's multiply-adds saved: the first block dense, a summary of idle
# tokens as context, and features taught by the dense model.
model = dict(
    backbone=dict(keep_ratios=[[1.0, 0.51], 0.51, 0.51, 0.51], policy=dict(context='summary'))
)
