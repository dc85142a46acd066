# How an idle model is fine-tuned from its dense twin's checkpoint, `load_from`; see finetune.py for
# how a config takes these.
finetune_epochs = 4
finetune = dict(
    train_cfg=dict(max_epochs=finetune_epochs, val_interval=finetune_epochs),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
        dict(
            type='CosineAnnealingLR',
            by_epoch=True,
            begin=0,
            end=finetune_epochs,
            eta_min_ratio=0.01,
            convert_to_iter_based=True,
        ),
    ],
)
