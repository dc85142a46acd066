_base_ = [
    '../../_base_/backbones/idle-swin-t.py',
    '../../_base_/models/dino-4scale.py',
    '../../_base_/datasets/coco_detection_ms-crop.py',
    '../../_base_/schedules/schedule_1x.py',
    '../../_base_/default_runtime_det.py',
]

checkpoint = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        _base_.idle_swin_t,
        drop_path_rate=0.2,
        # Strides 8, 16 and 32; the neck makes the fourth scale.
        out_indices=(1, 2, 3),
        with_cp=False,
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

optim_wrapper = dict(
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
)
# Without warm-up.
param_scheduler = [dict(_base_.param_scheduler[1], milestones=[11])]
