_base_ = [
    '../_base_/models/retinanet_fpn.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/schedule_demo_det.py',
    '../_base_/default_runtime_det.py',
]

# A third of Swin-T's width under a light head, so that the backbone has most of the work to do.
model = dict(
    backbone=dict(
        type='SwinTransformer',
        embed_dims=32,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 16],
        window_size=4,
        out_indices=(1, 2, 3),
        drop_path_rate=0.0,
    ),
    neck=dict(
        _delete_=True,
        type='FPN',
        in_channels=[64, 128, 256],
        out_channels=64,
        num_outs=3,
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        stacked_convs=1,
        feat_channels=64,
        # Digits are half as high again as wide, so one shape of anchor is enough.
        anchor_generator=dict(
            _delete_=True,
            type='AnchorGenerator',
            scales=[1.8, 2.5, 3.5],
            ratios=[1.5],
            strides=[8, 16, 32],
        ),
    ),
    test_cfg=dict(nms_pre=300, max_per_img=60),
)

# Written by: python tools/dataset_converters/digit_scenes.py data/demo_scenes --size 256 ...
data_root = 'data/demo_scenes/coco/'
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
