_base_ = './retinanet_idle-pvt-t_fpn_1x-keep70_coco.py'

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/pvt/retinanet_pvt-s_fpn_1x_coco/retinanet_pvt-s_fpn_1x_coco_20210906_142921-b6c94a5b.pth'
model = dict(backbone=dict(num_layers=[3, 4, 6, 3]))
