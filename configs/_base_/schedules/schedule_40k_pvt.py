# Semantic FPN as PVT trains it: 40k iterations on 8 GPUs with 4 crops each.
_base_ = './schedule_160k.py'

max_iters = 40000
interval = 4000
train_cfg = dict(max_iters=max_iters, val_interval=interval)
default_hooks = dict(checkpoint=dict(interval=interval))

optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.0002, weight_decay=0.0001)
)
param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=40000, eta_min=0.0, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=32)
