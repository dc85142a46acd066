_base_ = './semantic-fpn.py'

# Sized for two cores; the config names the backbone, whose stages have 32 to 256 channels.
model = dict(
    # Images of one size need no padding; class weights of mmseg cannot digest padded labels.
    data_preprocessor=dict(size=None, size_divisor=1, test_cfg=dict(size_divisor=1)),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
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
)
