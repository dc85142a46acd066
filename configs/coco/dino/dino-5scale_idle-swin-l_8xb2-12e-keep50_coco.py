_base_ = './dino-5scale_idle-swin-l_8xb2-12e-keep70_coco.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
