_base_ = './upernet.py'

# Sized for two cores; the config names the backbone, whose stages have 32 to 256 channels.
model = dict(
    # Images of one size need no padding; class weights of mmseg cannot digest padded labels.
    data_preprocessor=dict(size=None, size_divisor=1, test_cfg=dict(size_divisor=1)),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        # Nine pixels in ten are background.
        loss_decode=[
            dict(type='CrossEntropyLoss', class_weight=[0.2] + [1.0] * 10),
            dict(type='DiceLoss', loss_weight=3.0),
        ],
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN'),
    ),
)
