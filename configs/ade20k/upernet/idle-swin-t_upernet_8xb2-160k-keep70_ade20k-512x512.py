_base_ = [
    './idle-swin-t_upernet_8xb2-160k-dense_ade20k-512x512.py',
    '../../_base_/schedules/finetune_160k.py',
]

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/swin/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210531_112542-e380ad3e.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.000018))
param_scheduler = {{_base_.finetune.param_scheduler}}
