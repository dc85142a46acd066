_base_ = [
    '../_base_/models/classifier_deit-s.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_30e_idlevit.py',
    '../_base_/default_runtime_cls.py',
]

load_from = 'checkpoints/deit-s_in1k.pth'
model = dict(
    backbone=dict(
        drop_path_rate=0.0,
        keep_ratios=dict(type='3+3+2', keep_ratio=0.7),
        policy=dict(type='IdleViT', scorer='class_query', rounding='floor'),
    )
)
train_dataloader = dict(batch_size=1024)
custom_hooks = [
    dict(
        type='AuxiliaryLossHook',
        losses=[
            dict(type='TokenCutLoss', weighting='published', loss_weight=20.0),
            dict(type='LogitDistillation', modules=('head',), loss_weight=10.0),
            # The paper's 1000 is for the mean over channels.
            dict(type='FeatureDistillation', tokens='class', loss_weight=1000 / 384),
        ],
    )
]
