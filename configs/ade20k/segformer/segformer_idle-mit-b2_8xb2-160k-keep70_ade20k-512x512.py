_base_ = './segformer_idle-mit-b1_8xb2-160k-keep70_ade20k-512x512.py'

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b2_512x512_160k_ade20k/segformer_mit-b2_512x512_160k_ade20k_20210726_112103-cbd414ac.pth'
model = dict(backbone=dict(num_layers=[3, 4, 6, 3]))
