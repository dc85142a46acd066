_base_ = './retinanet_idle-pvtv2-b0_fpn_1x-keep70_coco.py'

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/pvt/retinanet_pvtv2-b1_fpn_1x_coco/retinanet_pvtv2-b1_fpn_1x_coco_20210831_103318-7e169a7d.pth'
model = dict(backbone=dict(embed_dims=64), neck=dict(in_channels=[64, 128, 320, 512]))
