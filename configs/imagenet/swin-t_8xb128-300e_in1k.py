_base_ = [
    '../_base_/models/classifier_swin-t.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_300e_deit.py',
    '../_base_/default_runtime_cls.py',
]

train_dataloader = dict(sampler=dict(type='DefaultSampler'))
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
warmup, cosine = _base_.param_scheduler
param_scheduler = [dict(warmup, end=21), cosine]
