_base_ = './fpn_idle-pvt-t_8xb4-40k-dense_ade20k-512x512.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
model = dict(backbone=dict(num_layers=[3, 4, 6, 3], init_cfg=dict(checkpoint=checkpoint)))
