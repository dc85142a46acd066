_base_ = [
    './dino-5scale_idle-swin-l_8xb2-12e-dense_coco.py',
    '../../_base_/schedules/finetune_1x.py',
]

load_from = 'https://download.openmmlab.com/mmdetection/v3.0/dino/dino-5scale_swin-l_8xb2-12e_coco/dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
