# What the segmentors of scenes with digits share; a config takes it by name.
# Images of one size need no padding; class weights of mmseg cannot digest padded labels.
unpadded = dict(size=None, size_divisor=1, test_cfg=dict(size_divisor=1))
small_head = dict(
    channels=64,
    dropout_ratio=0.0,
    num_classes=11,
    norm_cfg=dict(type='BN'),
    # Nine pixels in ten are background.
    loss_decode=[
        dict(type='CrossEntropyLoss', class_weight=[0.2] + [1.0] * 10),
        dict(type='DiceLoss', loss_weight=3.0),
    ],
)
