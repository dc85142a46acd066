# Written by: python tools/dataset_converters/digit_scenes.py data/digit_scenes
digit_classes = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
digit_palette = [
    *((228, 26, 28), (55, 126, 184), (77, 175, 74), (152, 78, 163), (255, 127, 0)),
    *((255, 255, 51), (166, 86, 40), (247, 129, 191), (0, 206, 209), (153, 255, 51)),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
