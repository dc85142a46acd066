_base_ = './retinanet_idle-pvtv2-b2_fpn_1x-keep70_coco.py'

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/pvt/retinanet_pvtv2-b3_fpn_1x_coco/retinanet_pvtv2-b3_fpn_1x_coco_20210903_151512-8357deff.pth'
model = dict(backbone=dict(num_layers=[3, 4, 18, 3]))
