_base_ = '../fpn_idle-pvtv2_finetune_digits.py'

# 45 % of the backbone's multiply-adds saved, with the ratios that do the least damage to the dense
# model (tools/search.py --attention 0 0.05): most idle blocks are their MLP alone. Idle tokens
# follow their representative, features are distilled.
model = dict(
    backbone=dict(
        keep_ratios=[[1.0, 0.8], 0.6, 0.6, 0.1],
        policy=dict(type='EvoViT', attention_ratios=[1.0, 0.0, 0.0, 0.0]),
    )
)
custom_hooks = [
    dict(type='AuxiliaryLossHook', losses=[dict(type='FeatureDistillation', loss_weight=5.0)])
]
