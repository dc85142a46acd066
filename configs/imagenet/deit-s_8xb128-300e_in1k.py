_base_ = [
    '../_base_/models/classifier_deit-s.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_300e_deit.py',
    '../_base_/default_runtime_cls.py',
]
