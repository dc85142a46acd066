_base_ = './digit_scenes.py'

data_root = 'data/digit_scenes/ade/'
metainfo = dict(
    classes=('background', *_base_.digit_classes),
    palette=[[0, 0, 0], *map(list, _base_.digit_palette)],
)

# No flips: a mirrored digit is another sign. The writer has varied colours, crops and sizes.
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
# The name by which mmseg.apis finds it.
test_pipeline = pipeline

dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=metainfo,
    reduce_zero_label=True,
    img_suffix='.jpg',
    seg_map_suffix='.png',
    pipeline=pipeline,
)
train_dataloader = dict(
    dataset=dict(
        dataset, data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')
    )
)
val_dataloader = dict(
    dataset=dict(
        dataset,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
    )
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
