_base_ = './mask-rcnn_idle-vitdet-b_simple-fpn_lsj-100e-keep70_coco.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
