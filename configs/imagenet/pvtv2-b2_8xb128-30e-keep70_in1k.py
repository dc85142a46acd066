_base_ = [
    '../_base_/models/classifier_pvtv2-b2.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_30e_evit.py',
    '../_base_/default_runtime_cls.py',
]

load_from = 'work_dirs/pvtv2-b2_8xb128-300e_in1k/epoch_300.pth'
model = dict(backbone=dict(drop_path_rate=0.0, keep_ratios=0.7))
custom_hooks = [
    dict(
        type='AuxiliaryLossHook',
        losses=[
            dict(type='LogitDistillation', modules=('head',), loss_weight=10.0),
            dict(type='FeatureDistillation', loss_weight=5.0),
        ],
    )
]
