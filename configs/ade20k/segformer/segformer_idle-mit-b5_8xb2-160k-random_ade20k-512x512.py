_base_ = './segformer_idle-mit-b5_8xb2-160k-keep70_ade20k-512x512.py'

custom_hooks = [_base_.finetune.random_ratios, *_base_.custom_hooks]
