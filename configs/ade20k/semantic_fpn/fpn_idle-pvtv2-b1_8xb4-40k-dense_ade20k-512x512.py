_base_ = './fpn_idle-pvtv2-b0_8xb4-40k-dense_ade20k-512x512.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth'
model = dict(
    backbone=dict(embed_dims=64, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
