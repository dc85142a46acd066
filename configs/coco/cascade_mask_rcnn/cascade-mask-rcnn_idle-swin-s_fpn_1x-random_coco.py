_base_ = './cascade-mask-rcnn_idle-swin-s_fpn_1x-keep70_coco.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
