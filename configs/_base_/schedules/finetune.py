# How an idle model is fine-tuned from a dense checkpoint. mmengine refuses the same key in two
# bases, so all is kept under one name: a config can have both a dense config and this as bases, and
# takes what it needs from here by name.
finetune = dict(
    distillation_weight=5.0,
    random_ratios=dict(type='RandomKeepRatioHook', low=0.3, high=1.0, per='model'),
)
