_base_ = './retinanet_idle-pvtv2-b2_fpn_1x-keep70_coco.py'

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/pvt/retinanet_pvtv2-b5_fpn_1x_coco/retinanet_pvtv2-b5_fpn_1x_coco_20210902_201800-3420eb57.pth'
model = dict(backbone=dict(num_layers=[3, 6, 40, 3], mlp_ratios=(4, 4, 4, 4)))

# One image on a GPU, as the dense recipe has it.
train_dataloader = dict(batch_size=1, num_workers=1)
optim_wrapper = dict(optimizer=dict(lr=0.00003 / 1.4))
auto_scale_lr = dict(base_batch_size=8)
