_base_ = './mask-rcnn_fpn.py'

# Sized for two cores; the config names the backbone, whose stages have 32 to 256 channels.
model = dict(
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # Digits are half as high again as wide, so one shape of anchor is enough.
        anchor_generator=dict(scales=[3, 4.5], ratios=[1.5], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        # Digits of 12 to 40 pixels would nearly all fall to the finest level at COCO's 56.
        bbox_roi_extractor=dict(out_channels=64, finest_scale=16),
        bbox_head=dict(in_channels=64, fc_out_channels=128, num_classes=10),
        mask_roi_extractor=dict(out_channels=64, finest_scale=16),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)
