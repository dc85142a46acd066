# EViT's fine-tuning: 30 epochs on 8 GPUs with 128 images each, no warm-up, hardly any decay.
_base_ = './schedule_300e_deit.py'

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-6))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=2e-6, by_epoch=True, begin=0, end=max_epochs)
]
default_hooks = dict(checkpoint=dict(interval=1))
