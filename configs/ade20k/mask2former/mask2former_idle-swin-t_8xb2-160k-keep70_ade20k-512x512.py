_base_ = [
    './mask2former_idle-swin-t_8xb2-160k-dense_ade20k-512x512.py',
    '../../_base_/schedules/finetune_160k.py',
]

load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512/mask2former_swin-t_8xb2-160k_ade20k-512x512_20221203_234230-7d64e5dd.pth'
model = dict(backbone={{_base_.finetune.backbone}})

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
# Checkpoints when it is evaluated.
default_hooks = dict(checkpoint=dict(interval=16000))
