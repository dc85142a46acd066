_base_ = './classifier.py'

# Every stage ends with a norm, as in the dense classifier.
model = dict(
    backbone=dict(
        type='IdlePyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        out_indices=(3,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', in_channels=512),
)
