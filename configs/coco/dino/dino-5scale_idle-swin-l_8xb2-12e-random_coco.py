_base_ = './dino-5scale_idle-swin-l_8xb2-12e-keep70_coco.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
