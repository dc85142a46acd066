_base_ = ['./vit_dense_digits.py', '../_base_/schedules/finetune_digits.py']

load_from = 'work_dirs/vit_dense_digits/epoch_20.pth'
model = dict(
    backbone=dict(
        # These blocks have the ratio, the others are dense.
        keep_ratios=dict(type='evit', keep_ratio=0.7, blocks=[4, 5, 6, 7, 8, 9, 10, 11]),
        policy=dict(type='EvoViT', rank_at=[4, 8]),
    )
)
custom_hooks = [dict(type='StageWiseHook', begin=2)]
train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.0003))
param_scheduler = {{_base_.finetune.param_scheduler}}
