_base_ = './schedule_1x_swin.py'

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
warmup, steps = _base_.param_scheduler
param_scheduler = [warmup, dict(steps, end=max_epochs, milestones=[27, 33])]
