_base_ = [
    './mask-rcnn_idle-vitdet-b_simple-fpn_lsj-100e-dense_coco.py',
    '../../_base_/schedules/finetune_lsj_vitdet.py',
]

load_from = 'work_dirs/mask-rcnn_idle-vitdet-b_simple-fpn_lsj-100e-dense_coco/iter_184375.pth'
model = dict(
    backbone=dict(
        keep_ratios=dict(_delete_=True, type='powers', keep_ratio=0.7, first_idle=1, groups=1),
        idle_where='pays',
        policy=dict(type='EvoViT'),
        init_cfg=None,
    )
)

train_cfg = {{_base_.finetune.train_cfg}}
optim_wrapper = dict(optimizer=dict(lr=0.00003))
param_scheduler = {{_base_.finetune.param_scheduler}}
