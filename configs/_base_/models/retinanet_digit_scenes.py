_base_ = './retinanet_fpn.py'

# Sized for two cores; the config names the backbone, whose stages have 32 to 256 channels.
model = dict(
    neck=dict(
        _delete_=True, type='FPN', in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        stacked_convs=2,
        feat_channels=64,
        # Digits are half as high again as wide, so one shape of anchor is enough.
        anchor_generator=dict(
            octave_base_scale=3, scales_per_octave=2, ratios=[1.5], strides=[4, 8, 16, 32]
        ),
    ),
    test_cfg=dict(nms_pre=200, max_per_img=20),
)
