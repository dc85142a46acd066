_base_ = './segformer_idle-mit-b2_8xb2-160k-dense_ade20k-512x512.py'

checkpoint = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/mit_b4_20220624-d588d980.pth'
model = dict(backbone=dict(num_layers=[3, 8, 27, 3], init_cfg=dict(checkpoint=checkpoint)))
