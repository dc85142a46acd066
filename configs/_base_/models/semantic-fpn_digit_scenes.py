_base_ = ['./semantic-fpn.py', './digit_scenes_head.py']

# Sized for two cores; the config names the backbone, whose stages have 32 to 256 channels.
model = dict(
    data_preprocessor={{_base_.unpadded}},
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    decode_head=dict(_base_.small_head, in_channels=[64, 64, 64, 64]),
)
