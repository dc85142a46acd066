_base_ = './semantic-fpn.py'

# Sized for two cores; the config names the backbone, whose stages have 32 to 256 channels.
model = dict(
    data_preprocessor=dict(size=None, size_divisor=32, test_cfg=dict(size_divisor=32)),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN'),
    ),
)
