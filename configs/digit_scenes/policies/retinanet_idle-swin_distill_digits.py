_base_ = '../retinanet_idle-swin_finetune_digits.py'

# The dense model that the weights come from is the teacher too.
custom_hooks = [
    dict(type='AuxiliaryLossHook', losses=[dict(type='FeatureDistillation', loss_weight=5.0)])
]
