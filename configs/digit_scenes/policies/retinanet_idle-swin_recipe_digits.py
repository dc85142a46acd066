_base_ = './retinanet_idle-swin_distill_digits.py'

# A third of the backbone's multiply-adds saved: the first block dense, what idle tokens receive
# that of their representative, and features taught by the dense model.
model = dict(backbone=dict(keep_ratios=[[1.0, 0.53], 0.53, 0.53, 0.53], policy=dict(type='EvoViT')))
