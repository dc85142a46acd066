# Semantic FPN of ADE20K's size; the config names the backbone and its channels.
_base_ = './segmentor.py'

model = dict(
    neck=dict(type='FPN', out_channels=256, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        feature_strides=[4, 8, 16, 32],
        channels=128,
    ),
)
