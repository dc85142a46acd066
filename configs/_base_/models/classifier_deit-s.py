_base_ = './classifier.py'

model = dict(
    backbone=dict(
        type='IdleVisionTransformer',
        arch='deit-small',
        drop_path_rate=0.1,
        output_cls_token=True,
    ),
    head=dict(type='VisionTransformerClsHead', in_channels=384),
)
