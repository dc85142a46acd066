_base_ = './schedule_digit_scenes_det.py'

max_epochs = 20
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
warmup, cosine = _base_.param_scheduler
param_scheduler = [dict(warmup, end=84), dict(cosine, end=max_epochs)]
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=1),
    visualization=dict(type='VisualizationHook'),
)
auto_scale_lr = dict(base_batch_size=32)
