_base_ = './fpn_idle-pvt-s_8xb4-40k-keep70_ade20k-512x512.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
