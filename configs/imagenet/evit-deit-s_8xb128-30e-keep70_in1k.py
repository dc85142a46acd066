_base_ = [
    '../_base_/models/classifier_deit-s.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_30e_evit.py',
    '../_base_/default_runtime_cls.py',
]

load_from = 'checkpoints/deit-s_in1k.pth'
model = dict(
    backbone=dict(
        # The release fine-tunes in eval mode.
        drop_path_rate=0.0,
        keep_ratios=dict(type='evit', keep_ratio=0.7, blocks=[3, 6, 9]),
        policy=dict(type='EViT', scorer='class_attention', fuse=True),
    )
)
