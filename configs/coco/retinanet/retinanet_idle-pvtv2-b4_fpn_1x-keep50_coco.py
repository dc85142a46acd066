_base_ = './retinanet_idle-pvtv2-b4_fpn_1x-keep70_coco.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
