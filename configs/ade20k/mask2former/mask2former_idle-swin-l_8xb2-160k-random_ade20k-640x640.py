_base_ = './mask2former_idle-swin-l_8xb2-160k-keep70_ade20k-640x640.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
