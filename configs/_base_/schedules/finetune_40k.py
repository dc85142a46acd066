# Three tenths of the dense 40k.
_base_ = './finetune_160k.py'

finetune_iters = 12000
finetune = dict(
    train_cfg=dict(max_iters=finetune_iters, val_interval=4000),
    param_scheduler=[
        _base_.finetune.param_scheduler[0],
        dict(_base_.finetune.param_scheduler[1], end=finetune_iters),
    ],
)
