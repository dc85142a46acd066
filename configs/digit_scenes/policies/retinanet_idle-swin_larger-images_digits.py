_base_ = [
    './retinanet_idle-swin_larger-images_dense_digits.py',
    '../../_base_/schedules/finetune_digit_scenes.py',
]

# Images of 1.5 times the side, for less multiply-adds than the dense backbone has at the side of 1:
# ratios that do the least damage to the dense model (tools/search.py --attention 0 0.05).
model = dict(
    backbone=dict(
        keep_ratios=[[0.8, 0.4], 0.4, [0.4, 0.1], 0.1],
        policy=dict(_delete_=True, type='EvoViT', attention_ratios=[1.0, 1.0, [1.0, 0.05], 0.0]),
    )
)
custom_hooks = [
    dict(type='AuxiliaryLossHook', losses=[dict(type='FeatureDistillation', loss_weight=5.0)])
]
load_from = 'work_dirs/retinanet_idle-swin_larger-images_dense_digits/epoch_6.pth'
train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.0003))
param_scheduler = {{_base_.finetune.param_scheduler}}
