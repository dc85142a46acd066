_base_ = [
    './segformer_idle-mit-b0_8xb2-160k-dense_ade20k-512x512.py',
    '../../_base_/schedules/finetune_160k.py',
]

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b0_512x512_160k_ade20k/segformer_mit-b0_512x512_160k_ade20k_20210726_101530-8ffa8fda.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.000018))
param_scheduler = {{_base_.finetune.param_scheduler}}
