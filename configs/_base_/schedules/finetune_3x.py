# A third of the dense 3x.
_base_ = './finetune.py'

finetune_epochs = 12
finetune = dict(
    train_cfg=dict(max_epochs=finetune_epochs),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
        dict(
            type='CosineAnnealingLR',
            by_epoch=True,
            begin=0,
            end=finetune_epochs,
            eta_min_ratio=0.01,
            convert_to_iter_based=True,
        ),
    ],
)
