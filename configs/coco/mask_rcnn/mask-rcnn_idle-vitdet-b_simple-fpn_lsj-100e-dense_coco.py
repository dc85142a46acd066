_base_ = [
    '../../_base_/models/mask-rcnn_fpn.py',
    '../../_base_/datasets/coco_instance.py',
    '../../_base_/schedules/schedule_lsj_100e_vitdet.py',
    '../../_base_/default_runtime_det.py',
]

checkpoint = 'https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth'
image_size = (1024, 1024)
norm_cfg = dict(type='LN2d', requires_grad=True)
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]
    ),
    backbone=dict(
        type='IdleViTDet',
        img_size=1024,
        patch_size=16,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        mlp_ratio=4,
        qkv_bias=True,
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        use_rel_pos=True,
        pretrain_img_size=224,
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', requires_grad=True),
        keep_ratios=1.0,
        policy=dict(scorer='mean_distance', scope='map'),
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='SimpleFeaturePyramid',
        in_channels=768,
        out_channels=256,
        num_outs=5,
        norm_cfg=norm_cfg,
    ),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)

# Large-scale jitter: a tenth to twice the size.
load_image, load_annotations, _, flip, pack = _base_.train_pipeline
pad = dict(type='Pad', size=image_size, pad_val=dict(img=(114, 114, 114)))
train_pipeline = [
    load_image,
    load_annotations,
    flip,
    dict(type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop',
        crop_type='absolute_range',
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    pad,
    pack,
]
test_pipeline = [
    load_image,
    dict(type='Resize', scale=image_size, keep_ratio=True),
    pad,
    *_base_.test_pipeline[2:],
]
train_dataloader = dict(
    batch_size=4, num_workers=8, batch_sampler=None, dataset=dict(pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
