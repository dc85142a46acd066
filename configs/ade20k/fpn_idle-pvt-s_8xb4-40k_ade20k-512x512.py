_base_ = './semantic_fpn/fpn_idle-pvt-s_8xb4-40k-dense_ade20k-512x512.py'

# 70 % of the tokens from the beginning: not fine-tuned, but trained from the backbone's weights.
model = dict(
    backbone=dict(
        keep_ratios=dict(_delete_=True, type='powers', keep_ratio=0.7, first_idle=1, groups=1),
        idle_where='pays',
    )
)
