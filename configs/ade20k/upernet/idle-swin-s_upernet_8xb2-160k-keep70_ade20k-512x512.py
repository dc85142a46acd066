_base_ = './idle-swin-t_upernet_8xb2-160k-keep70_ade20k-512x512.py'

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/swin/upernet_swin_small_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K/upernet_swin_small_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210526_192015-ee2fff1c.pth'
model = dict(backbone=dict(depths=[2, 2, 18, 2]))
