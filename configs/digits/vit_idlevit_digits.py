_base_ = ['./vit_dense_digits.py', '../_base_/schedules/finetune_digits.py']

load_from = 'work_dirs/vit_dense_digits/epoch_20.pth'
model = dict(
    backbone=dict(
        keep_ratios=dict(type='3+3+2', keep_ratio=0.7),
        policy=dict(type='IdleViT', scorer='class_query', rounding='floor'),
    )
)
train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.0003))
param_scheduler = {{_base_.finetune.param_scheduler}}
custom_hooks = [
    dict(
        type='AuxiliaryLossHook',
        losses=[
            dict(type='TokenCutLoss', weighting='published', loss_weight=20.0),
            dict(type='LogitDistillation', modules=('head',), loss_weight=10.0),
            dict(type='FeatureDistillation', tokens='class', loss_weight=1000 / 48),
        ],
    )
]
