_base_ = '../retinanet_idle-swin_finetune_digits.py'

# A third of the backbone's multiply-adds saved.
model = dict(
    backbone=dict(
        keep_ratios=[[1.0, 0.51], 0.51, 0.51, 0.51], policy=dict(_delete_=True, type='EvoViT')
    )
)
