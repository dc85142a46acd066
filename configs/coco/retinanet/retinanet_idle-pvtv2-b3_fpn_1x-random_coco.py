_base_ = './retinanet_idle-pvtv2-b3_fpn_1x-keep70_coco.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
