_base_ = ['./swin_dense_digits.py', '../_base_/schedules/finetune_digits.py']

load_from = 'work_dirs/swin_dense_digits/epoch_20.pth'
model = dict(
    backbone=dict(
        keep_ratios=dict(type='powers', keep_ratio=0.7, first_idle=1, groups=1),
        policy=dict(type='IdleViT'),
    )
)
train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.0003))
param_scheduler = {{_base_.finetune.param_scheduler}}
