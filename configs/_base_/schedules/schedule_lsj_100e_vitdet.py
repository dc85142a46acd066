# ViTDet's 100 epochs of COCO: iterations on 16 GPUs with 4 images each.
_base_ = './schedule_1x.py'

max_iters = 184375
interval = 5000
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=interval,
    # The last iteration is evaluated, too.
    dynamic_intervals=[(max_iters // interval * interval + 1, max_iters)],
)

# Rates fall by this factor from each block to the one below. A name's own settings are those of
# the longest key that it contains, so norms and biases, which do not decay, are named.
decay = 0.7
blocks = {f'backbone.layers.{i}.': dict(lr_mult=decay ** (12 - i)) for i in range(12)}
free = ('ln1', 'ln2', 'attn.qkv.bias', 'attn.proj.bias', 'ffn.layers.0.0.bias', 'ffn.layers.1.bias')
embedding = dict(lr_mult=decay**13)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            'backbone.pos_embed': dict(embedding, decay_mult=0.0),
            'backbone.patch_embed': embedding,
            'backbone.patch_embed.projection.bias': dict(embedding, decay_mult=0.0),
            **blocks,
            **{f'{k}{part}': dict(blocks[k], decay_mult=0.0) for k in blocks for part in free},
        },
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR',
        begin=0,
        end=max_iters,
        by_epoch=False,
        milestones=[163889, 177546],
        gamma=0.1,
    ),
]

default_hooks = dict(
    checkpoint=dict(by_epoch=False, save_last=True, interval=interval, max_keep_ckpts=5)
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=64)
