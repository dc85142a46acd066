_base_ = './classifier.py'

# The last map has a norm of its own, as the dense classifier has.
model = dict(
    backbone=dict(type='IdleSwinTransformer', drop_path_rate=0.2, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', in_channels=768),
)
