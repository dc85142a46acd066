_base_ = [
    '../_base_/models/segformer.py',
    '../_base_/models/digit_scenes_head.py',
    '../_base_/datasets/digit_scenes_semantic.py',
    '../_base_/schedules/schedule_demo_seg.py',
    '../_base_/default_runtime_seg.py',
]

# A third of Swin-T's width under SegFormer's head, which leaves most of the work to the backbone.
model = dict(
    data_preprocessor={{_base_.unpadded}},
    backbone=dict(
        type='SwinTransformer',
        embed_dims=32,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 16],
        window_size=4,
        drop_path_rate=0.0,
    ),
    decode_head=dict(_base_.small_head, in_channels=[32, 64, 128, 256]),
)

# Written by: python tools/dataset_converters/digit_scenes.py data/demo_scenes --size 256 ...
data_root = 'data/demo_scenes/ade/'
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
