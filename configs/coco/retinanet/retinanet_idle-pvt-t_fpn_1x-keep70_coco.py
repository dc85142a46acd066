_base_ = ['./retinanet_idle-pvt-t_fpn_1x-dense_coco.py', '../../_base_/schedules/finetune_1x.py']

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/pvt/retinanet_pvt-t_fpn_1x_coco/retinanet_pvt-t_fpn_1x_coco_20210831_103110-17b566bd.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
