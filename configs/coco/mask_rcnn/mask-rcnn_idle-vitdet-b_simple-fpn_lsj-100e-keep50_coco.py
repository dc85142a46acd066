_base_ = './mask-rcnn_idle-vitdet-b_simple-fpn_lsj-100e-keep70_coco.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
