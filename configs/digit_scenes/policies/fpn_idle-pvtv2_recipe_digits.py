_base_ = '../fpn_idle-pvtv2_finetune_digits.py'

# A third of the backbone's multiply-adds saved: the first block dense, what idle tokens receive
# that of their representative, and features taught by the dense model.
model = dict(backbone=dict(keep_ratios=[[1.0, 0.47], 0.47, 0.47, 0.47], policy=dict(type='EvoViT')))
custom_hooks = [
    dict(
        type='AuxiliaryLossHook',
        losses=[
            dict(
                type='FeatureDistillation',
                teacher=dict(checkpoint={{_base_.load_from}}),
                loss_weight=5.0,
            )
        ],
    )
]
