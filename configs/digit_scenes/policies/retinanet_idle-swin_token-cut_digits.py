_base_ = '../retinanet_idle-swin_finetune_digits.py'

custom_hooks = [dict(type='AuxiliaryLossHook', losses=[dict(type='TokenCutLoss', loss_weight=0.1)])]
