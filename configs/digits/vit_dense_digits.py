_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/schedule_digits.py',
    '../_base_/default_runtime_cls.py',
]

# DeiT's twelve blocks, narrow, on 8 x 8 tokens.
model = dict(
    backbone=dict(
        type='IdleVisionTransformer',
        img_size=32,
        patch_size=4,
        embed_dims=48,
        num_layers=12,
        num_heads=3,
        output_cls_token=True,
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=48),
    train_cfg=None,
)
