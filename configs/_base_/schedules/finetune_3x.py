# A third of the dense 3x.
_base_ = './finetune_1x.py'

finetune_epochs = 12
finetune = dict(
    train_cfg=dict(max_epochs=finetune_epochs),
    param_scheduler=[
        _base_.finetune.param_scheduler[0],
        dict(_base_.finetune.param_scheduler[1], end=finetune_epochs),
    ],
)
