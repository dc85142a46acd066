_base_ = './idlevit-deit-s_2xb1024-30e-keep70_in1k.py'

custom_imports = dict(imports=['idlevit_mm', 'idlevit_mm.heads'])
load_from = 'checkpoints/lvvit-s_in1k.pth'
model = dict(
    backbone=dict(arch='lvvit-small', keep_ratios=dict(type='4+4+4')),
    head=dict(type='LVViTClsHead'),
)
hook = _base_.custom_hooks[0]
# Of each channel the mean over 196 tokens and the class token.
tokens = dict(type='FeatureDistillation', tokens='kept', loss_weight=1000 / 197)
custom_hooks = [dict(hook, losses=[*hook.losses[:2], tokens])]
