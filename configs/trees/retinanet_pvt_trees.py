_base_ = '../demo/retinanet_pvt_scenes.py'

# Written by: python tools/dataset_converters/trees.py WHEEL data/trees
data_root = 'data/trees/'
metainfo = dict(classes=('tree',), palette=[(0, 158, 115)])

# The backbone begins with what it has learned of digits; without it, from scratch.
model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/demo/detector/dense/epoch_2.pth')
    ),
    bbox_head=dict(num_classes=1, anchor_generator=dict(ratios=[1.0])),
    test_cfg=dict(nms_pre=1000, max_per_img=300),
)

# The converter wrote quarter turns of the tiles: with flips, crowns are seen in all positions.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomCrop', crop_size=(448, 448)),
    dict(
        type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']
    ),
    dict(type='PackDetInputs'),
]

train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(batch_size=1, dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

max_epochs = 20
# Tested afterwards.
train_cfg = dict(max_epochs=max_epochs, val_begin=max_epochs + 1)
warmup, cosine = _base_.param_scheduler
param_scheduler = [warmup, dict(cosine, end=max_epochs)]
default_hooks = dict(checkpoint=dict(interval=4))
