_base_ = '../retinanet_idle-swin_dense_digits.py'

# Images of 1.5 times the side: 2.25 times the multiply-adds.
larger = dict(type='Resize', scale_factor=1.5)
train_pipeline = [*_base_.train_pipeline[:-1], larger, _base_.train_pipeline[-1]]
test_pipeline = [larger if step['type'] == 'Resize' else step for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
