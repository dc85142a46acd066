_base_ = [
    './fpn_idle-pvt-t_8xb4-40k-dense_ade20k-512x512.py',
    '../../_base_/schedules/finetune_40k.py',
]

load_from = 'work_dirs/fpn_idle-pvt-t_8xb4-40k-dense_ade20k-512x512/iter_40000.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00006))
param_scheduler = {{_base_.finetune.param_scheduler}}
