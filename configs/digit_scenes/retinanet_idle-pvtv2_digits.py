_base_ = [
    '../_base_/models/retinanet_digit_scenes.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/schedule_digit_scenes_det.py',
    '../_base_/default_runtime_det.py',
]

model = dict(
    backbone=dict(
        type='IdlePyramidVisionTransformerV2',
        embed_dims=32,
        num_layers=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        sr_ratios=[4, 2, 1, 1],
        mlp_ratios=[4, 4, 4, 4],
        drop_path_rate=0.0,
        keep_ratios=0.7,
        policy=dict(scorer='mean_distance', scope='map'),
    )
)
