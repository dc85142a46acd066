_base_ = './schedule_digit_scenes_det.py'

max_epochs = 2
# Tested afterwards.
train_cfg = dict(max_epochs=max_epochs, val_begin=max_epochs + 1)
optim_wrapper = dict(optimizer=dict(fused=True))
warmup, cosine = _base_.param_scheduler
param_scheduler = [dict(warmup, end=100), dict(cosine, end=max_epochs)]
default_hooks = dict(checkpoint=dict(save_best=None))
auto_scale_lr = dict(base_batch_size=2)
