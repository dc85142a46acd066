_base_ = [
    './mask-rcnn_idle-swin-t_fpn_amp-ms-crop-3x-dense_coco.py',
    '../../_base_/schedules/finetune_3x.py',
]

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco/mask_rcnn_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco_20210908_165006-90a4008c.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
