# PVT's tables of positions are stretched to the map; whole multiples keep them aligned with it.
_base_ = './ade20k.py'

test_pipeline = [
    *_base_.test_pipeline[:2],  # as far as Resize
    dict(type='ResizeToMultiple', size_divisor=32),
    *_base_.test_pipeline[2:],
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
