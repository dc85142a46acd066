"""Where COCO 2017 and ADE20K lie, and how they are linked into the places of the configs."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import DecompressionBombError

from ..datasets.formats import ADE20K_FOLDER, ADE20K_IMAGES, COCO_IMAGES, coco_ann_file
from ..errors import UsageError, one_line

DATASETS = ('coco', 'ade20k')
# Where the configs look for the data set.
PLACES = {'coco': 'data/coco', 'ade20k': f'data/ade/{ADE20K_FOLDER}'}
# What makes up a split: folders of images or masks, and files of annotations.
PARTS = {
    'coco': {split: (split, coco_ann_file(split)) for split in COCO_IMAGES},
    'ade20k': {split: (f'images/{split}', f'annotations/{split}') for split in ADE20K_IMAGES},
}
# Names that only the full release of ADE20K has; its masks number thousands of object names.
_FULL_ADE20K = ('ADE20K_2016_07_26', 'ADE20K_2021_17_01', 'index_ade20k.mat', 'index_ade20k.pkl')


def place_problem(path: Path) -> str | None:
    """What is wrong with the place of a part of a data set, if anything."""
    if not path.exists():
        return 'is missing'
    if path.suffix == '.json':
        return None if path.is_file() else 'is a folder instead of a file'
    if not path.is_dir():
        return 'is a file instead of a folder'
    has_images = any(n.lower().endswith(('.jpg', '.jpeg', '.png')) for n in os.listdir(path))
    return None if has_images else 'holds no images'


def full_ade20k(root: Path) -> str | None:
    """What to say to someone who has the full release of ADE20K; None for any other folder."""
    if root.name not in _FULL_ADE20K and not any((root / name).exists() for name in _FULL_ADE20K):
        return None
    return (
        f'{root} is the full release of ADE20K. The 150 classes of the benchmark were merged from '
        'its thousands of names by hand, and the images resized, so it cannot be converted '
        f'exactly: download {ADE20K_FOLDER} (docs/data.md)'
    )


def read_picture(file: Path | io.BytesIO) -> tuple[np.ndarray, str]:
    """Pixels of a picture, and Pillow's name of its kind (``'L'`` is 8-bit, one channel).

    Raises:
        OSError: It cannot be decoded to its end, whatever Pillow raises.
    """
    try:
        with Image.open(file) as image:
            return np.asarray(image), image.mode
    except UnidentifiedImageError as error:
        raise OSError('is no image') from error
    except (SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError) as error:
        raise OSError(one_line(error)) from error


def base_folder(root: Path) -> Path:
    """Folder of the layout; of ADE20K the one above is taken as well."""
    return root / ADE20K_FOLDER if (root / ADE20K_FOLDER).is_dir() else root


def bring_into_place(dataset: str, root: Path, target: Path) -> Iterator[str]:
    """Make the layout that the configs expect, in ``target``, of links to what lies in ``root``.

    Nothing that was there is ever deleted or overwritten.

    Yields:
        One line for each thing done.

    Raises:
        UsageError: A part is missing, or its place is taken.
    """
    if dataset == 'ade20k' and (full := full_ade20k(root)):
        raise UsageError(full)
    base = base_folder(root)
    parts = [part for split in PARTS[dataset].values() for part in split]
    for part in parts:
        if problem := place_problem(base / part):
            raise UsageError(f'{base / part} {problem}, nothing was linked')
    for part in parts:
        found, goal = (base / part).resolve(), target / part
        if goal.exists() and goal.resolve() == found:
            continue
        if goal.exists() or goal.is_symlink():
            raise UsageError(
                f'{goal} exists already and nothing is overwritten: name another folder with '
                '--link, or move it away'
            )
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.symlink_to(found)
        yield f'linked {goal} -> {found}'
