_base_ = './idle-swin-b_upernet_8xb2-160k-keep70_ade20k-512x512.py'

load_from = 'work_dirs/idle-swin-l_upernet_8xb2-160k-dense_ade20k-512x512/iter_160000.pth'
model = dict(
    backbone=dict(
        embed_dims=192,
        num_heads=[6, 12, 24, 48],
        window_size=12,
        pretrain_img_size=384,
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
