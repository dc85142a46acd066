"""What COCO 2017 and ADE20K look like on disk: facts that writers and checkers share.

Standard library only, so that a folder can be checked wherever there is a Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Supercategory -> first category id and names; removed categories left gaps between the ids.
_COCO_GROUPS: Mapping[str, tuple[int, str]] = {
    'person': (1, 'person'),
    'vehicle': (2, 'bicycle, car, motorcycle, airplane, bus, train, truck, boat'),
    'outdoor': (10, 'traffic light, fire hydrant, , stop sign, parking meter, bench'),
    'animal': (16, 'bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe'),
    'accessory': (27, 'backpack, umbrella, , , handbag, tie, suitcase'),
    'sports': (
        34,
        'frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, '
        'surfboard, tennis racket',
    ),
    'kitchen': (44, 'bottle, , wine glass, cup, fork, knife, spoon, bowl'),
    'food': (52, 'banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake'),
    'furniture': (62, 'chair, couch, potted plant, bed, , dining table, , , toilet'),
    'electronic': (72, 'tv, laptop, mouse, remote, keyboard, cell phone'),
    'appliance': (78, 'microwave, oven, toaster, sink, refrigerator'),
    'indoor': (84, 'book, clock, vase, scissors, teddy bear, hair drier, toothbrush'),
}


@dataclass(frozen=True)
class Category:
    """One of COCO's categories, as its annotation files list them."""

    id: int
    name: str
    supercategory: str


COCO_CATEGORIES: tuple[Category, ...] = tuple(
    Category(first + offset, name, group)
    for group, (first, names) in _COCO_GROUPS.items()
    for offset, name in enumerate(names.split(', '))
    if name
)

# Split -> number of images of the whole data set.
COCO_IMAGES: Mapping[str, int] = {'train2017': 118287, 'val2017': 5000}
ADE20K_IMAGES: Mapping[str, int] = {'training': 20210, 'validation': 2000}

ADE20K_FOLDER = 'ADEChallengeData2016'
# Masks hold 0 for "other", which is ignored, and 1 to this number for the classes.
ADE20K_CLASSES = 150


def coco_ann_file(split: str) -> str:
    """Path of the annotation file of ``'train2017'`` or ``'val2017'``, within COCO's folder."""
    return f'annotations/instances_{split}.json'


def coco_file_name(image_id: int) -> str:
    """Name of an image file of COCO 2017."""
    return f'{image_id:012d}.jpg'


def ade20k_name(split: str, number: int) -> str:
    """Name, without suffix, of image and mask of ADE20K's ``'training'`` or ``'validation'``."""
    short = {'training': 'train', 'validation': 'val'}[split]
    return f'ADE_{short}_{number:08d}'
