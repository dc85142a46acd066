_base_ = './mask_rcnn/mask-rcnn_idle-swin-t_fpn_1x-dense_coco.py'

# 70 % of the tokens from the beginning: not fine-tuned, but trained from the backbone's weights.
model = dict(
    backbone=dict(
        keep_ratios=dict(_delete_=True, type='powers', keep_ratio=0.7, first_idle=1, groups=1),
        idle_where='pays',
    )
)
