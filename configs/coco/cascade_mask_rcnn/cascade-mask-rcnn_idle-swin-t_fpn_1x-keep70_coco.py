_base_ = [
    './cascade-mask-rcnn_idle-swin-t_fpn_1x-dense_coco.py',
    '../../_base_/schedules/finetune_1x.py',
]

load_from = 'work_dirs/cascade-mask-rcnn_idle-swin-t_fpn_1x-dense_coco/epoch_12.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
