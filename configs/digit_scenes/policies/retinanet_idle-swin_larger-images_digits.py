_base_ = '../retinanet_idle-swin_finetune_digits.py'

# Images of 1.25 times the side, for the multiply-adds of the dense backbone at the side of 1.
model = dict(
    backbone=dict(
        keep_ratios=[[1.0, 0.5], 0.5, 0.5, 0.5], policy=dict(_delete_=True, type='EvoViT')
    )
)
larger = dict(type='Resize', scale_factor=1.25)
train_pipeline = [*_base_.train_pipeline[:-1], larger, _base_.train_pipeline[-1]]
test_pipeline = [larger if step['type'] == 'Resize' else step for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
