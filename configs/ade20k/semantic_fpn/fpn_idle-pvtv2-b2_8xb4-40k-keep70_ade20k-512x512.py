_base_ = './fpn_idle-pvtv2-b1_8xb4-40k-keep70_ade20k-512x512.py'

load_from = 'work_dirs/fpn_idle-pvtv2-b2_8xb4-40k-dense_ade20k-512x512/iter_40000.pth'
model = dict(backbone=dict(num_layers=[3, 4, 6, 3]))
