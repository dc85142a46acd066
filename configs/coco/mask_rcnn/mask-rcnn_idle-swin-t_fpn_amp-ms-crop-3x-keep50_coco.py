_base_ = './mask-rcnn_idle-swin-t_fpn_amp-ms-crop-3x-keep70_coco.py'

model = dict(backbone=dict(keep_ratios=dict(keep_ratio=0.5)))
