# IdleViT's fine-tuning: 30 epochs on 2 GPUs with 1024 images each.
_base_ = './schedule_30e_evit.py'

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        # Its optimiser is not given these two.
        custom_keys={'pos_embed': dict(lr_mult=0.0), 'cls_token': dict(lr_mult=0.0)}
    ),
)
param_scheduler = [dict(_base_.param_scheduler[0], eta_min=1e-6)]
auto_scale_lr = dict(base_batch_size=2048)
