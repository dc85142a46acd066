_base_ = './mask2former_idle-swin-t_8xb2-160k-dense_ade20k-512x512.py'

checkpoint = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_large_patch4_window12_384_22k_20220412-6580f57d.pth'
crop_size = (640, 640)
model = dict(
    # Images of tests are not padded to multiples: the reference forgets to.
    data_preprocessor=dict(size=crop_size, test_cfg=None),
    backbone=dict(
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        pretrain_img_size=384,
        init_cfg=dict(checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
)

train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(
        type='RandomChoiceResize',
        # From half the size of a crop to twice that.
        scales=[int(640 * tenths * 0.1) for tenths in range(5, 21)],
        resize_type='ResizeShortestEdge',
        max_size=2560,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    *_base_.train_pipeline[4:],
]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(type='Resize', scale=(2560, 640), keep_ratio=True),
    *_base_.test_pipeline[2:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# The norms of the blocks that Swin-T has not.
backbone_free = dict(lr_mult=0.1, decay_mult=0.0)
norms = [f'backbone.stages.2.blocks.{block}.norm' for block in range(6, 18)]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict.fromkeys(norms, backbone_free)))
