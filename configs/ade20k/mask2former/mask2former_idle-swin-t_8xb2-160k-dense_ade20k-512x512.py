_base_ = [
    '../../_base_/backbones/idle-swin-t.py',
    '../../_base_/models/mask2former.py',
    '../../_base_/datasets/ade20k.py',
    '../../_base_/schedules/schedule_160k.py',
    '../../_base_/default_runtime_seg.py',
]

# The head is made of parts of mmdet.
custom_imports = dict(imports=['idlevit_mm', 'mmdet.models'], allow_failed_imports=False)

checkpoint = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_tiny_patch4_window7_224_20220317-1cdeb081.pth'
model = dict(
    backbone=dict(
        _base_.idle_swin_t,
        drop_path_rate=0.3,
        with_cp=False,
        frozen_stages=-1,
        # This checkpoint has OpenMMLab's names already.
        convert_weights=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)

train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(
        type='RandomChoiceResize',
        # From half the size of a crop to twice that.
        scales=[int(512 * tenths * 0.1) for tenths in range(5, 21)],
        resize_type='ResizeShortestEdge',
        max_size=2048,
    ),
    *_base_.train_pipeline[3:],
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))

# A name's own settings are those of the longest key that it contains.
embedding = dict(lr_mult=1.0, decay_mult=0.0)
backbone_free = dict(lr_mult=0.1, decay_mult=0.0)
depths = _base_.idle_swin_t.depths
norms = [
    'patch_embed.norm',
    'norm',
    *[f'stages.{i}.blocks.{j}.norm' for i, depth in enumerate(depths) for j in range(depth)],
    *[f'stages.{i}.downsample.norm' for i in range(len(depths) - 1)],
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.0001, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999)),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(
        custom_keys={
            'backbone': dict(lr_mult=0.1, decay_mult=1.0),
            'absolute_pos_embed': backbone_free,
            'relative_position_bias_table': backbone_free,
            **{f'backbone.{norm}': backbone_free for norm in norms},
            'query_embed': embedding,
            'query_feat': embedding,
            'level_embed': embedding,
        },
        norm_decay_mult=0.0,
    ),
)
param_scheduler = [dict(type='PolyLR', eta_min=0, power=0.9, begin=0, end=160000, by_epoch=False)]

train_cfg = dict(val_interval=5000)
default_hooks = dict(checkpoint=dict(interval=5000, save_best='mIoU'))
auto_scale_lr = dict(enable=False, base_batch_size=16)
