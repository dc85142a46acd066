# Images of several scales, half of them cropped: the augmentation of DETR and Sparse R-CNN.
_base_ = './coco_instance.py'

scales = [(size, 1333) for size in range(480, 801, 32)]
train_pipeline = [
    *_base_.train_pipeline[:2],  # what loads
    _base_.train_pipeline[3],  # flips
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True,
                ),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
            ],
        ],
    ),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
