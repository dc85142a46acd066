_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/schedule_digits.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(
    backbone=dict(
        type='IdleSwinTransformer',
        embed_dims=32,
        patch_size=2,
        strides=[2, 2, 2],
        depths=[2, 4, 2],
        num_heads=[2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(2,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=128),
    train_cfg=None,
)
