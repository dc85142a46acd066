_base_ = './retinanet_idle-pvt-t_fpn_1x-dense_coco.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
model = dict(backbone=dict(num_layers=[3, 4, 6, 3], init_cfg=dict(checkpoint=checkpoint)))
