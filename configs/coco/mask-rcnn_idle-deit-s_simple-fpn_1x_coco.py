_base_ = [
    '../_base_/models/mask-rcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x_swin.py',
    '../_base_/default_runtime_det.py',
]

checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
model = dict(
    backbone=dict(
        type='IdleVisionTransformer',
        arch='deit-small',
        drop_path_rate=0.1,
        # Four dense blocks, then three with 0.7, three with 0.7 ** 2, two with 0.7 ** 3 of the
        # tokens.
        keep_ratios=dict(type='powers', keep_ratio=0.7, first_idle=4),
        idle_where='pays',
        policy=dict(type='IdleViT', scorer='class_query'),
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    # The map of stride 16 becomes maps of stride 4, 8, 16 and 32; the fifth is every second pixel.
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=384, num_outs=5),
)

optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        custom_keys={'pos_embed': dict(decay_mult=0.0), 'cls_token': dict(decay_mult=0.0)},
    )
)
