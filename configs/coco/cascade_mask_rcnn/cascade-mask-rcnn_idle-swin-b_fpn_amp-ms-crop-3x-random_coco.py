_base_ = './cascade-mask-rcnn_idle-swin-b_fpn_amp-ms-crop-3x-keep70_coco.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
