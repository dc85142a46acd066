_base_ = './dino-4scale_idle-swin-t_8xb2-12e-keep70_coco.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
