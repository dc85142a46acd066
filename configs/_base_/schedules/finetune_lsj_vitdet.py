# A third of ViTDet's 100 epochs.
_base_ = './finetune_160k.py'

finetune_iters = 60000
finetune = dict(
    train_cfg=dict(max_iters=finetune_iters, val_interval=5000, dynamic_intervals=None),
    param_scheduler=[
        _base_.finetune.param_scheduler[0],
        dict(_base_.finetune.param_scheduler[1], end=finetune_iters),
    ],
)
