_base_ = './fpn_idle-pvtv2-b0_8xb4-40k-keep70_ade20k-512x512.py'

load_from = 'work_dirs/fpn_idle-pvtv2-b1_8xb4-40k-dense_ade20k-512x512/iter_40000.pth'
model = dict(backbone=dict(embed_dims=64), neck=dict(in_channels=[64, 128, 320, 512]))
