_base_ = './segformer_idle-mit-b2_8xb2-160k-keep70_ade20k-512x512.py'

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b3_512x512_160k_ade20k/segformer_mit-b3_512x512_160k_ade20k_20210726_081410-962b98d2.pth'
model = dict(backbone=dict(num_layers=[3, 4, 18, 3]))
