_base_ = '../fpn_idle-pvtv2_finetune_digits.py'

# About a third of the backbone's multiply-adds saved: the first block dense, a summary of idle
# tokens as context, and features taught by the dense model.
model = dict(
    backbone=dict(keep_ratios=[[1.0, 0.45], 0.45, 0.45, 0.45], policy=dict(context='summary'))
)
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
