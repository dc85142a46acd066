_base_ = ['./upernet.py', './digit_scenes_head.py']

# Sized for two cores; the config names the backbone, whose stages have 32 to 256 channels.
model = dict(
    data_preprocessor={{_base_.unpadded}},
    decode_head=dict(_base_.small_head, in_channels=[32, 64, 128, 256]),
    auxiliary_head=dict(
        in_channels=128, channels=64, dropout_ratio=0.0, num_classes=11, norm_cfg=dict(type='BN')
    ),
)
