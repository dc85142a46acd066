# Semantic FPN as PVT trains it: 40k iterations on 8 GPUs with 4 crops each.
_base_ = './schedule_40k.py'

optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.0002, weight_decay=0.0001)
)
param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=40000, eta_min=0.0, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=32)
