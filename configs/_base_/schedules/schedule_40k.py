_base_ = './schedule_160k.py'

max_iters = 40000
interval = 4000
train_cfg = dict(max_iters=max_iters, val_interval=interval)
default_hooks = dict(checkpoint=dict(interval=interval))
