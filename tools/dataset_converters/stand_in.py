"""Tiny stand-ins for COCO 2017 and ADE20K, in exactly their formats.

They let everything that reads those data sets run where these are not at hand. The images are
digit scenes under the names, in the folders and with the annotations of the real ones, and with
what surprises newcomers there: gaps between category ids, a crowd region, an image without
annotations, a greyscale photograph, portrait and landscape formats.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from digit_scenes import compact_json, encoded
from pycocotools import mask as mask_utils
from scenes import DigitScenesParams, Scene, integers, render_scene

from idlevit_mm.datasets.formats import (
    ADE20K_CLASSES,
    ADE20K_FOLDER,
    ADE20K_IMAGES,
    COCO_CATEGORIES,
    COCO_IMAGES,
    ade20k_name,
    coco_ann_file,
    coco_file_name,
)

Files = Iterator[tuple[str, bytes]]  # relative path and content

MIN_SIZE = 64
# Height / width of successive images; none divides a stride, two follow each other upright.
_ASPECTS = (0.75, 1.5, 0.67, 1.33, 1.0)
# Digits 0 to 9 spread over all categories or classes, the first and the last among them.
_COCO_OF_DIGIT = tuple(COCO_CATEGORIES[79 * digit // 9] for digit in range(10))
_ADE20K_OF_DIGIT = tuple(ADE20K_CLASSES - 15 * digit for digit in range(10))
_SCENE_SPLITS = dict(train2017='train', val2017='val', training='train', validation='val')


def image_size(size: int, index: int) -> tuple[int, int]:
    """Height and width of an image, both odd; the longer side is about ``size``."""
    longer = size - 4 * (index % 3)
    aspect = _ASPECTS[index % len(_ASPECTS)]
    height, width = (longer * aspect, longer) if aspect < 1 else (longer, longer / aspect)
    return round(height) // 2 * 2 - 1, round(width) // 2 * 2 - 1


def paint(split: str, index: int, size: int, seed: int) -> Scene:
    """Paint the scene of image ``index`` of a split of COCO 2017 or of ADE20K."""
    sides = image_size(size, index)
    scale = max(8, min(sides) // 5), max(8, min(sides) // 2)
    params = DigitScenesParams(size=sides, seed=seed, num_digits=(2, 4), digit_scale=scale)
    return render_scene(params, _SCENE_SPLITS[split], index)


def polygons_of(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a mask (H, W) of zeros and ones as COCO writes them, x and y in turn.

    Holes are filled and the outline runs through the centres of the outermost pixels, so it equals
    the mask to a pixel only, as drawn outlines do. Parts of less than three corners are left out.
    """
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(line.reshape(-1) + 0.5).tolist() for line in outlines if len(line) >= 3]


def run_lengths_of(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask (H, W) down its columns, beginning with zeros."""
    changes = np.flatnonzero(np.diff(mask.ravel(order='F'), prepend=0))
    return np.diff([0, *changes, mask.size]).tolist()


def coco_annotations(
    scene: Scene, image_id: int, first_id: int, crowd: bool
) -> list[dict[str, Any]]:
    """Annotations of one image in COCO's spelling, with ids from ``first_id`` on.

    Segmentations are polygons; with ``crowd`` all digits but the first are joined into one region,
    which has run lengths.
    """
    size = scene.owner.shape
    shown = 1 if crowd else len(scene.labels)
    outlines: list[Any] = [polygons_of(scene.mask(index)) for index in range(shown)]
    if crowd:
        counts = run_lengths_of((scene.owner > 1).astype(np.uint8))
        outlines.append({'counts': counts, 'size': [*size]})
    annotations = []
    for index, segmentation in enumerate(outlines):
        rle = mask_utils.frPyObjects(segmentation, *size)
        rle = rle if isinstance(rle, dict) else mask_utils.merge(rle)
        annotations.append(
            {
                'segmentation': segmentation,
                'area': float(mask_utils.area(rle)),
                'iscrowd': int(isinstance(segmentation, dict)),
                'image_id': image_id,
                'bbox': [float(side) for side in mask_utils.toBbox(rle)],
                'category_id': _COCO_OF_DIGIT[scene.labels[index]].id,
                'id': first_id + index,
            }
        )
    return annotations


def ade20k_mask(scene: Scene, index: int) -> np.ndarray:
    """(H, W) uint8 in ADE20K's coding: 0 other, 1 to 150 the classes.

    The photograph is one class, another in each image; its lowest eighth is "other".
    """
    classes = [1 + index % ADE20K_CLASSES, *(_ADE20K_OF_DIGIT[label] for label in scene.labels)]
    mask = np.array(classes, dtype=np.uint8)[scene.owner]
    lowest = slice(-max(1, mask.shape[0] // 8), None)
    mask[lowest][scene.owner[lowest] == 0] = 0
    return mask


def _coco_files(counts: Sequence[int], size: int, seed: int) -> Files:
    next_annotation = 1
    for split, count in zip(COCO_IMAGES, counts, strict=True):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            scene = paint(split, index, size, seed)
            # Ids of the real first images; by their remainder the two splits never meet.
            image_id = {'train2017': 9, 'val2017': 139}[split] + 16 * index
            name = coco_file_name(image_id)
            picture = cv2.cvtColor(scene.image, cv2.COLOR_BGR2GRAY) if index == 1 else scene.image
            yield f'{split}/{name}', encoded('.jpg', picture)
            height, width = scene.owner.shape
            about = {'license': 1, 'file_name': name, 'coco_url': ''}
            about |= {'height': height, 'width': width, 'date_captured': '2017-01-01 00:00:00'}
            images.append({**about, 'flickr_url': '', 'id': image_id})
            if index < 2 or index < count - 1:
                annotations += coco_annotations(scene, image_id, next_annotation, index == 0)
                next_annotation = annotations[-1]['id'] + 1
        text = f'Stand-in for COCO 2017 {split}, made of digit scenes'
        info = {'description': text, 'url': '', 'version': '1.0', 'year': 2017}
        content = {
            'info': {**info, 'contributor': 'idlevit_mm', 'date_created': '2017/01/01'},
            'licenses': [{'url': '', 'id': 1, 'name': 'Material of scikit-learn, BSD-3-Clause'}],
            'images': images,
            'annotations': annotations,
            'categories': [
                {'supercategory': c.supercategory, 'id': c.id, 'name': c.name}
                for c in COCO_CATEGORIES
            ],
        }
        yield coco_ann_file(split), compact_json(content)


def _ade20k_files(counts: Sequence[int], size: int, seed: int) -> Files:
    pixels = np.zeros(ADE20K_CLASSES + 1, dtype=np.int64)
    shown = {split: np.zeros_like(pixels) for split in ADE20K_IMAGES}
    scenes = []
    for split, count in zip(ADE20K_IMAGES, counts, strict=True):
        for index in range(count):
            scene = paint(split, index, size, seed)
            mask = ade20k_mask(scene, index)
            name = ade20k_name(split, index + 1)
            yield f'images/{split}/{name}.jpg', encoded('.jpg', scene.image)
            yield f'annotations/{split}/{name}.png', encoded('.png', mask)
            number = np.bincount(mask.ravel(), minlength=len(pixels))
            pixels += number
            shown[split] += number > 0
            scenes.append(f'{name} misc\n')
    yield 'sceneCategories.txt', ''.join(scenes).encode()
    yield 'objectInfo150.txt', _object_info(pixels, shown).encode()


def _object_info(pixels: np.ndarray, shown: Mapping[str, np.ndarray]) -> str:
    """Table of the classes: share of the pixels, images that show them, whether they are stuff."""
    from mmseg.datasets import ADE20KDataset

    lines = ['Idx\tRatio\tTrain\tVal\tStuff\tName']
    for number, name in enumerate(ADE20KDataset.METAINFO['classes'], start=1):
        ratio = pixels[number] / pixels[1:].sum()
        stuff = int(pixels[number] > 0 and number not in _ADE20K_OF_DIGIT)
        images = [shown[split][number] for split in ADE20K_IMAGES]
        lines.append('\t'.join(map(str, (number, f'{ratio:.4f}', *images, stuff, name.strip()))))
    return '\n'.join([*lines, ''])


# Data set -> files, folder below which they lie, and where it is by default.
_KINDS = {
    'coco': (_coco_files, '', 'data/coco'),
    'ade20k': (_ade20k_files, ADE20K_FOLDER, 'data/ade'),
}


def write_stand_in(
    dataset: str,
    out: str | os.PathLike[str],
    num_train: int = 4,
    num_val: int = 3,
    size: int = 160,
    seed: int = 0,
) -> bool:
    """Write a stand-in for COCO 2017 or ADE20K, unless the same one is already there.

    In each split of COCO, the first image has a crowd region, the second is greyscale, and the last
    one has no annotations if there are three or more. Ten of the 80 categories occur. ADE20K needs
    mmseg for the names of the classes.

    Args:
        dataset: ``'coco'`` or ``'ade20k'``.
        out: Gets COCO's ``train2017``, ``val2017`` and ``annotations``, or ``ADEChallengeData2016``
            with ``images``, ``annotations``, ``objectInfo150.txt`` and ``sceneCategories.txt``.
        num_train: Number of training images.
        num_val: Number of validation images.
        size: Length of the longer side of an image in pixels, at least 64.
        seed: Seed, non-negative.

    Returns:
        True if it was written, False if it was already there.

    Raises:
        ValueError: A value is outside what is allowed.
        FileExistsError: The folder holds anything else.
    """
    values = dict(num_train=(num_train, 1), num_val=(num_val, 1), size=(size, MIN_SIZE))
    for name, (value, low) in dict(values, seed=(seed, 0)).items():
        integers(name, value, low)
    make, below, _ = _KINDS[dataset]
    root = Path(out, below)
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is not a folder')
    contents = dict(make((num_train, num_val), size, seed))
    present = {path.relative_to(root).as_posix() for path in root.rglob('*') if not path.is_dir()}
    for name in sorted(present):
        if name not in contents or (root / name).read_bytes() != contents[name]:
            raise FileExistsError(
                f'{root} holds other files, such as {name!r}; nothing was written. Choose '
                'another folder'
            )
    missing = contents.keys() - present
    for name in sorted(missing):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents[name])
    return bool(missing)


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('dataset', choices=_KINDS, help='data set to stand in for')
    add('--out', help='folder to write (default: data/coco or data/ade)')
    add('--num-train', type=int, default=4, help='number of training images (default: 4)')
    add('--num-val', type=int, default=3, help='number of validation images (default: 3)')
    size_help = 'longer side of an image (default: 160)'
    add('--size', type=int, default=160, metavar='PIXELS', help=size_help)
    add('--seed', type=int, default=0, help='seed (default: 0)')
    args = parser.parse_args()
    args.out = args.out or _KINDS[args.dataset][2]
    try:
        written = write_stand_in(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    done = 'wrote' if written else 'already there:'
    images = f'{args.num_train} + {args.num_val} images'
    print(f'{done} stand-in for {args.dataset} of {images} in {args.out}')


if __name__ == '__main__':
    main()
