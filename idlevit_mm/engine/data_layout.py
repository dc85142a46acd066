"""Links COCO 2017 and ADE20K into the places of the configs, and rewrites masks of ADE20K.

Nothing that was there is ever deleted or overwritten: what is made is made beside what is there.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import DecompressionBombError

from ..datasets.formats import (
    ADE20K_CLASSES,
    ADE20K_FOLDER,
    ADE20K_IMAGES,
    COCO_IMAGES,
    coco_ann_file,
)
from ..errors import UsageError, one_line, shortened

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
# Pillow's names of pictures whose pixels are one number of 8 bits.
INDEX_MODES = ('L', 'P')


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


def exact_mask(values: np.ndarray) -> np.ndarray | None:
    """A mask with one channel of 8 bits that says the same, or None if there is none.

    Args:
        values: (H, W) or (H, W, channels), any integer type. A fourth channel is opacity.

    Returns:
        (H, W) uint8 with values 0 to 150, if all colour channels are equal and within that range.
    """
    if values.ndim == 3:
        colours = values[..., :3] if values.shape[-1] > 2 else values[..., :1]
        values = colours[..., 0]
        if (colours != values[..., None]).any():
            return None
    right = values.dtype != bool and values.min() >= 0 and values.max() <= ADE20K_CLASSES
    return values.astype(np.uint8) if right else None


def _convert_masks(source: Path, target: Path) -> str:
    """Link the masks that are right, and write those that can be made right."""
    linked, written, left_out = 0, 0, []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder with some of the masks would pass for all of them, so it is moved when complete.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            (part := Path(folder, target.name)).mkdir()
            for path in sorted(source.glob('*.png')):
                try:
                    values, mode = read_picture(path)
                except OSError as error:
                    left_out.append(f'{path.name} cannot be read ({one_line(error, 200)})')
                    continue
                if mode in INDEX_MODES:
                    (part / path.name).symlink_to(path.resolve())
                    linked += 1
                elif (exact := exact_mask(values)) is not None:
                    Image.fromarray(exact).save(part / path.name)
                    written += 1
                else:
                    left_out.append(f'{path.name} has colours that are not numbers of classes')
            part.rename(target)
    except OSError as error:
        raise UsageError(f'{target} cannot be written: {one_line(error)}') from error
    rest = f'; {len(left_out)} left out: {shortened(left_out)}' if left_out else ''
    return f'made {target}: {linked} masks linked, {written} written with one channel{rest}'


def bring_into_place(dataset: str, root: Path, target: Path, convert: bool) -> Iterator[str]:
    """Make the layout that the configs expect, of links to what lies somewhere else.

    Args:
        dataset: ``'coco'`` or ``'ade20k'``.
        root: Folder that holds the data in that layout.
        target: Folder to make.
        convert: Also look into every mask, and rewrite those of several channels where that is
            exact.

    Yields:
        One line for each thing done.

    Raises:
        UsageError: A part is missing, or its place is taken.
    """
    if dataset == 'ade20k' and (full := full_ade20k(root)):
        raise UsageError(full)
    base = root / ADE20K_FOLDER if (root / ADE20K_FOLDER).is_dir() else root
    parts = [part for split in PARTS[dataset].values() for part in split]
    for part in parts:
        if problem := place_problem(base / part):
            raise UsageError(f'{base / part} {problem}, nothing was linked')
    for part in parts:
        found, goal = base / part, target / part
        masks = convert and dataset == 'ade20k' and part.startswith('annotations/')
        if goal.exists() and goal.resolve() == found.resolve() and not masks:
            continue
        if goal.exists() or goal.is_symlink():
            raise UsageError(
                f'{goal} exists already and nothing is overwritten: name another folder with '
                '--link, or move it away'
            )
        if masks:
            yield _convert_masks(found, goal)
        else:
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.symlink_to(found.resolve())
            yield f'linked {goal} -> {found.resolve()}'
