_base_ = ['./retinanet_idle-swin_digits.py', '../_base_/schedules/finetune_digit_scenes.py']

load_from = 'work_dirs/retinanet_idle-swin_dense_digits/epoch_6.pth'
train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.0003))
param_scheduler = {{_base_.finetune.param_scheduler}}
