_base_ = [
    '../_base_/backbones/idle-vit_digit_scenes.py',
    '../_base_/models/semantic-fpn_digit_scenes.py',
    '../_base_/datasets/digit_scenes_semantic.py',
    '../_base_/schedules/schedule_digit_scenes_seg.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(backbone={{_base_.idle_vit}}, neck=dict(_base_.simple_pyramid, _delete_=True))
optim_wrapper = dict(paramwise_cfg={{_base_.idle_vit_decay}})
