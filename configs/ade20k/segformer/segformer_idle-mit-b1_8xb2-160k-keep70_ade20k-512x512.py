_base_ = './segformer_idle-mit-b0_8xb2-160k-keep70_ade20k-512x512.py'

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b1_512x512_160k_ade20k/segformer_mit-b1_512x512_160k_ade20k_20210726_112106-d70e859d.pth'
model = dict(backbone=dict(embed_dims=64), decode_head=dict(in_channels=[64, 128, 320, 512]))
