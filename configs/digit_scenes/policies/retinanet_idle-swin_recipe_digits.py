_base_ = './retinanet_idle-swin_distill_digits.py'

# A third of the backbone's multiply-adds saved, with the ratios that do the least damage to the
# dense model (tools/search.py); idle tokens follow their representative, features are distilled.
model = dict(
    backbone=dict(keep_ratios=[1.0, [0.5, 1.0], [0.4, 0.2], [0.3, 0.1]], policy=dict(type='EvoViT'))
)
