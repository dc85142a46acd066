_base_ = './segformer_idle-mit-b2_8xb2-160k-dense_ade20k-512x512.py'

checkpoint = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/mit_b3_20220624-13b1141c.pth'
model = dict(backbone=dict(num_layers=[3, 4, 18, 3], init_cfg=dict(checkpoint=checkpoint)))
