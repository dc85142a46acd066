_base_ = './evovit-deit-s_8xb128-300e_in1k.py'

model = dict(backbone=dict(arch='deit-tiny', drop_path_rate=0.0), head=dict(in_channels=192))
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=0.002))
warmup, cosine = _base_.param_scheduler
param_scheduler = [dict(warmup, start_factor=0.0005), cosine]
auto_scale_lr = dict(base_batch_size=2048)
