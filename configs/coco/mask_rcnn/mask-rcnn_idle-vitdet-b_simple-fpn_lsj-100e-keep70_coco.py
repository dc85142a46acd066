_base_ = [
    './mask-rcnn_idle-vitdet-b_simple-fpn_lsj-100e-dense_coco.py',
    '../../_base_/schedules/finetune_lsj_vitdet.py',
]

load_from = 'work_dirs/mask-rcnn_idle-vitdet-b_simple-fpn_lsj-100e-dense_coco/iter_184375.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
