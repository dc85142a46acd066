_base_ = './segformer_idle-mit-b2_8xb2-160k-keep70_ade20k-512x512.py'

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b5_512x512_160k_ade20k/segformer_mit-b5_512x512_160k_ade20k_20210726_145235-94cedf59.pth'
model = dict(backbone=dict(num_layers=[3, 6, 40, 3]))
