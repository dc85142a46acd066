# How an idle model is fine-tuned from a dense checkpoint, `load_from`, which also teaches it.
custom_hooks = [
    dict(type='AuxiliaryLossHook', losses=[dict(type='FeatureDistillation', loss_weight=5.0)])
]

# mmengine refuses the same key in two bases, so what a dense config sets too is kept under a name
# of its own: a config has a dense one and this as bases, and takes from here what it changes.
finetune = dict(
    random_ratios=dict(type='RandomKeepRatioHook', low=0.3, high=1.0, sandwich=True),
    # All weights come with load_from.
    backbone=dict(
        keep_ratios=dict(_delete_=True, type='powers', keep_ratio=0.7, first_idle=1, groups=1),
        idle_where='pays',
        policy=dict(type='EvoViT'),
        init_cfg=None,
    ),
)
