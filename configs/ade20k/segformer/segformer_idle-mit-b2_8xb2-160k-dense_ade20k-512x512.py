_base_ = './segformer_idle-mit-b1_8xb2-160k-dense_ade20k-512x512.py'

checkpoint = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/mit_b2_20220624-66e8bf70.pth'
model = dict(backbone=dict(num_layers=[3, 4, 6, 3], init_cfg=dict(checkpoint=checkpoint)))
