_base_ = [
    '../../_base_/models/dino-4scale.py',
    '../../_base_/datasets/coco_detection_ms-crop.py',
    '../../_base_/schedules/schedule_1x.py',
    '../../_base_/default_runtime_det.py',
]

checkpoint = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        type='IdleSwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        mlp_ratio=4,
        qkv_bias=True,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.2,
        patch_norm=True,
        # Strides 8, 16 and 32; the neck makes the fourth scale.
        out_indices=(1, 2, 3),
        with_cp=False,
        keep_ratios=1.0,
        policy=dict(scorer='mean_distance', scope='map'),
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

optim_wrapper = dict(
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
)
max_epochs = 12
param_scheduler = [
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[11], gamma=0.1)
]
