_base_ = './retinanet_idle-pvtv2-b2_fpn_1x-dense_coco.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b5.pth'
model = dict(
    backbone=dict(
        num_layers=[3, 6, 40, 3], mlp_ratios=(4, 4, 4, 4), init_cfg=dict(checkpoint=checkpoint)
    )
)

# One image on a GPU, and the learning rate that the authors train it with.
train_dataloader = dict(batch_size=1, num_workers=1)
optim_wrapper = dict(optimizer=dict(lr=0.0001 / 1.4))
auto_scale_lr = dict(base_batch_size=8)
