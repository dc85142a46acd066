_base_ = './retinanet_pvt_trees.py'

# A light head on a frozen backbone, for docs/studies/training_free.md. Written by:
# python tools/studies/training_free.py WHEEL --keep --save work_dirs/trees/dinov2.pth
model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
    backbone=dict(
        _delete_=True,
        type='IdleVisionTransformer',
        arch='dinov2-small',
        interpolate_mode='bicubic',
        frozen_stages=12,
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/trees/dinov2.pth'),
    ),
    neck=dict(
        _delete_=True,
        type='SimpleFeaturePyramid',
        in_channels=384,
        out_channels=64,
        scale_factors=[2.0, 1.0],
    ),
    # Sides of 21 to 59 pixels, as the middle 80 % of crowns have.
    bbox_head=dict(anchor_generator=dict(scales=[3.0, 4.2], strides=[7, 14])),
)

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_begin=max_epochs + 1)
warmup, cosine = _base_.param_scheduler
param_scheduler = [dict(warmup, end=20), dict(cosine, end=max_epochs)]
# The norm behind the blocks belongs to no stage that could be frozen.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.0, decay_mult=0.0)})
)
