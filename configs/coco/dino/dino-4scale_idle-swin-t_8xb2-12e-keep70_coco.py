_base_ = [
    './dino-4scale_idle-swin-t_8xb2-12e-dense_coco.py',
    '../../_base_/schedules/finetune_1x.py',
]

load_from = 'work_dirs/dino-4scale_idle-swin-t_8xb2-12e-dense_coco/epoch_12.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
