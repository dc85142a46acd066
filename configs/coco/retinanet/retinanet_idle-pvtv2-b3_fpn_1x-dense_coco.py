_base_ = './retinanet_idle-pvtv2-b2_fpn_1x-dense_coco.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b3.pth'
model = dict(backbone=dict(num_layers=[3, 4, 18, 3], init_cfg=dict(checkpoint=checkpoint)))
