_base_ = [
    '../_base_/backbones/idle-vit_digit_scenes.py',
    '../_base_/models/retinanet_digit_scenes.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/schedule_digit_scenes_det.py',
    '../_base_/default_runtime_det.py',
]

model = dict(backbone={{_base_.idle_vit}}, neck=dict(_base_.simple_pyramid, _delete_=True))
optim_wrapper = dict(paramwise_cfg={{_base_.idle_vit_decay}})
