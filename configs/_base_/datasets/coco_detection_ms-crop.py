# Images of several scales, half of them cropped, and images without objects too, as DINO wants it.
_base_ = './coco_detection.py'

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
                    # No image is longer than seven times its height.
                    scales=[(400, 4200), (500, 4200), (600, 4200)],
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
train_dataloader = dict(
    dataset=dict(filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline)
)
