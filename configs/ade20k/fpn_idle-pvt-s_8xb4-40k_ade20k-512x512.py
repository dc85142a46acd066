_base_ = './semantic_fpn/fpn_idle-pvt-s_8xb4-40k-dense_ade20k-512x512.py'

# 70 % of the tokens from the beginning: not fine-tuned, but trained from the backbone's weights.
model = dict(backbone=dict(keep_ratios=0.7, idle_where='pays'))
