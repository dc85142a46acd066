# Three tenths of the dense 160k.
_base_ = './finetune.py'

finetune_iters = 48000
finetune = dict(
    train_cfg=dict(max_iters=finetune_iters, val_interval=16000),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
        dict(
            type='CosineAnnealingLR',
            by_epoch=False,
            begin=0,
            end=finetune_iters,
            eta_min_ratio=0.01,
        ),
    ],
)
