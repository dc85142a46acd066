_base_ = './idlevit-deit-s_2xb1024-30e-keep70_in1k.py'

load_from = 'checkpoints/deit-b_in1k.pth'
model = dict(backbone=dict(arch='deit-base'), head=dict(in_channels=768))
hook = _base_.custom_hooks[0]
custom_hooks = [dict(hook, losses=[*hook.losses[:2], dict(hook.losses[2], loss_weight=1000 / 768)])]
