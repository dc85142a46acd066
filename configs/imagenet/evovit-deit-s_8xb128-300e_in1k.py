_base_ = './deit-s_8xb128-300e_in1k.py'

custom_imports = dict(imports=['idlevit_mm', 'idlevit_mm.heads'])
model = dict(
    backbone=dict(
        # The head normalises what it classifies.
        final_norm=False,
        keep_ratios=[1.0] * 4 + [0.5] * 8,
        policy=dict(
            type='EvoViT',
            rank_at=[4, 8],
            alpha=[1.0] * 4 + [0.5] * 8,
            representative=False,
            rounding='floor',
        ),
    ),
    head=dict(type='EvoViTClsHead'),
)
# Every block ranks in the first phase, only those of rank_at in the second.
custom_hooks = [dict(type='StageWiseHook', begin=200)]
