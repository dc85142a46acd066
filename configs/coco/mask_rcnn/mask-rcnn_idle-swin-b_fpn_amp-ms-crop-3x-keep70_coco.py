_base_ = './mask-rcnn_idle-swin-s_fpn_amp-ms-crop-3x-keep70_coco.py'

load_from = 'work_dirs/mask-rcnn_idle-swin-b_fpn_amp-ms-crop-3x-dense_coco/epoch_36.pth'
model = dict(
    backbone=dict(embed_dims=128, num_heads=[4, 8, 16, 32], drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
