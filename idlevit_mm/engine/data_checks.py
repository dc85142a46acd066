"""Checks a folder of COCO 2017 or ADE20K and says what is missing or malformed.

Every check returns findings as :mod:`idlevit_mm.engine.doctor` reports them. ``wrong`` is what a
training or its scores would stumble over; ``note`` is what mmdet or mmseg deal with themselves.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

from ..datasets.formats import (
    ADE20K_CLASSES,
    ADE20K_FOLDER,
    ADE20K_IMAGES,
    COCO_CATEGORIES,
    COCO_IMAGES,
)
from ..errors import one_line, shortened
from .data_layout import PARTS, base_folder, full_ade20k, place_problem, read_picture
from .doctor import NOTE, OK, WRONG, Finding

Findings = Iterator[Finding]

_LARGEST = sys.float_info.max
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    'a whole number': lambda value: type(value) is int,
    'a whole number above 0': lambda value: type(value) is int and value > 0,
    'a finite number': lambda value: type(value) in (int, float) and abs(value) <= _LARGEST,
    '0 or 1': lambda value: isinstance(value, int) and value in (0, 1),
    'text': lambda value: isinstance(value, str) and value != '',
    'given': lambda value: True,
}
# Table, field and kind of what an annotation file must have; boxes are looked at one by one.
_FIELDS = (
    ('images', 'id', 'a whole number'),
    ('images', 'height', 'a whole number above 0'),
    ('images', 'width', 'a whole number above 0'),
    ('images', 'file_name', 'text'),
    *(('annotations', name, 'a whole number') for name in ('id', 'image_id', 'category_id')),
    ('annotations', 'area', 'a finite number'),
    ('annotations', 'iscrowd', '0 or 1'),
    ('annotations', 'bbox', 'given'),
    ('categories', 'id', 'a whole number'),
    ('categories', 'name', 'text'),
)
# Kinds of faults of single annotations: what to say, how bad it is, what to do.
_FAULTS = {
    'category': ('categories referred to do not exist', WRONG, 'mmdet drops these boxes'),
    'image': ('images referred to do not exist', WRONG, 'the file belongs to other images'),
    'malformed': ('boxes are not [x, y, width, height]', WRONG, 'convert them'),
    'outside': ('boxes reach outside their image', WRONG, 'are they [x, y, width, height]?'),
    'zero': ('boxes are smaller than a pixel', NOTE, 'mmdet leaves them out'),
    'segmentation': ('annotations have no usable polygon or run lengths', NOTE, 'no masks in them'),
}
# Files of a split that are decoded when not all are.
SAMPLE = 200
_NAMED = 3
# COCO rounds coordinates to hundredths; more than this is no rounding.
_OUTSIDE = 1.0
_DOWNLOAD = 'docs/data.md has the commands to download, unpack and link it'


def sampled(items: Sequence[Any], deep: bool) -> Sequence[Any]:
    """All items, or a fixed number of them evenly spread."""
    if deep or len(items) <= SAMPLE:
        return items
    return [items[round(i * (len(items) - 1) / (SAMPLE - 1))] for i in range(SAMPLE)]


def decoded_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as mmdet and mmseg get it, turned as its EXIF data say.

    Raises:
        OSError: It is missing, or cannot be decoded to its end.
    """
    data = path.read_bytes()
    if not data:
        raise OSError('is empty')
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise OSError('cannot be decoded')
    # Older releases of OpenCV fill the rest of a file that was cut off with grey.
    if not data.rstrip(b'\0').endswith(b'\xff\xd9'):
        read_picture(io.BytesIO(data))
    return image.shape[0], image.shape[1]


def mask_problem(
    labels: np.ndarray,
    size: tuple[int, int],
    mask: str,
    image: str,
    classes: int | None,
    shift: int,
    ignored: Collection[int] = (255,),
) -> str | None:
    """What is wrong with the label map of a file ``mask`` of an ``image``, if anything.

    Args:
        labels: (H, W), classes from 0 on; what is below 0 is ignored.
        size: Height and width of the image.
        mask: Name of the file.
        image: Name of the image.
        classes: Number of classes, None if unknown.
        shift: What was subtracted from the values in the file.
        ignored: Labels that are ignored.
    """
    if labels.ndim != 2:
        return f'{mask} has {labels.shape[-1]} channels instead of one'
    if labels.shape != size:
        height, width = labels.shape
        return f'{mask} is {width}x{height}, but its image {image} {size[1]}x{size[0]}'
    beyond = labels[labels >= (classes or np.inf)]
    beyond = beyond[~np.isin(beyond, list(ignored))]
    if classes is None or not beyond.size:
        return None
    found, largest = int(beyond.min()) + shift, classes - 1 + shift
    return f'{mask} holds the value {found}, but with {classes} classes the largest is {largest}'


def _coco_image_problem(path: Path, size: tuple[int, int]) -> str | None:
    height, width = decoded_size(path)
    same = (height, width) == size
    return None if same else f'{path.name} is {width}x{height}, not {size[1]}x{size[0]}'


def _ade20k_pair_problem(image: Path, mask: Path) -> str | None:
    size = decoded_size(image)
    try:
        values, mode = read_picture(mask)
    except OSError as error:
        return f'{mask.name}: {one_line(error, 200)}'
    if mode not in ('L', 'P'):  # Pillow's names of pictures of one number of 8 bits
        return f'{mask.name} is of kind {mode}, not one channel of 8 bits (L)'
    # Class 1 becomes 0, and "other" -1. 255 means nothing in ADE20K's files.
    labels = values.astype(np.int16) - 1
    return mask_problem(labels, size, mask.name, image.name, ADE20K_CLASSES, shift=1)


def _check_files(
    split: str, problem: Callable[..., str | None], items: Sequence[Any], deep: bool, remedy: str
) -> Finding:
    """Look into files, all or a sample; ``problem`` tells what is wrong with one of the items."""
    chosen = sampled(items, deep)

    def look(item: tuple[Path, Any]) -> str | None:
        try:
            return problem(*item)
        except OSError as error:
            return f'{item[0].name}: {one_line(error, 200)}'

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        answers = track(pool.map(look, chosen), f'{split}: decoding', len(chosen), transient=True)
        problems = [text for text in answers if text is not None]
    if problems:
        value = f'{len(problems)} of {len(chosen)} decoded: {shortened(problems, _NAMED)}'
        return Finding(split, 'decoding', value, WRONG, remedy)
    part = f'{len(chosen)} of {len(items)} decoded (--deep decodes all)'
    value = part if len(chosen) < len(items) else f'all {len(items)} decoded'
    return Finding(split, 'decoding', value)


def _count(split: str, found: int, expected: int) -> Finding:
    value, remedy = f'{found} images', 'it was added to'
    if found > expected:
        value += f', more than the {expected} of the original'
    elif found < expected:
        value += f', a subset of {expected}'
        remedy = 'scores on a subset cannot be compared with published ones'
    return Finding(split, 'images', value, OK if found == expected else NOTE, remedy)


def _listed(
    split: str, name: str, text: str, items: Iterable[Any], remedy: str, status: str = WRONG
) -> Findings:
    """A finding on things, if there are any; ``{}`` in the text is their number."""
    if found := list(items):
        value = f'{text.format(len(found))}: {shortened(found, _NAMED)}'
        yield Finding(split, name, value, status, remedy)


def load_annotations(path: Path) -> tuple[dict[str, Any], str | None]:
    """An annotation file of COCO, and what is wrong with it as a whole, if anything."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f'cannot be read as JSON ({one_line(error, 200)}): it is cut off or another file'
    if not isinstance(content, dict):
        return {}, f'holds a {type(content).__name__}, not the tables images, annotations, ...'
    for table, name, kind in _FIELDS:
        if not isinstance(content.get(table), list):
            hint = ': the file names of a test set' if table == 'annotations' else ''
            return {}, f'has no list {table!r}{hint}'
        for number, entry in enumerate(content[table]):
            if isinstance(entry, dict) and 'segments_info' in entry:
                return {}, 'is a panoptic annotation file, not instances'
            if not isinstance(entry, dict) or name not in entry:
                return {}, f'has an entry without {name!r}: {table}[{number}]'
            if not _KINDS[kind](entry[name]):
                has = f'has {json.dumps(entry[name]):.40} for {name!r}'
                which = f'{table}[{number}] (id {entry.get("id")!r:.40})'
                return {}, f'{has} in {which}, which must be {kind}'
    return content, None


def first_problem(path: Path) -> str | None:
    """What is wrong with an annotation file of COCO as a whole, or with the first bad box."""
    content, problem = load_annotations(path)
    for number, ann in enumerate(content.get('annotations', ())):
        if _box_fault(ann['bbox'], sys.maxsize, sys.maxsize) == 'malformed':
            return f'has the bbox {ann["bbox"]!r:.40} in annotations[{number}] (id {ann["id"]})'
    return problem


def _category_problem(categories: Sequence[dict]) -> str | None:
    """How the categories of an annotation file differ from COCO's 80, if they do."""
    given = [(entry['id'], entry['name']) for entry in categories]
    wanted = [(category.id, category.name) for category in COCO_CATEGORIES]
    if sorted(given) == wanted:
        return None if given == wanted else "are COCO's 80, but in another order"
    pairs = zip_longest(given, wanted, fillvalue='none')
    mine, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    return f'{len(given)} categories; first difference: {mine} instead of {theirs}'


def _box_fault(box: Any, width: int, height: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_KINDS['a finite number'], box)):
        return 'malformed'
    x, y, w, h = box
    if w < 1 or h < 1:
        return 'malformed' if w < 0 or h < 0 else 'zero'
    return 'outside' if max(-x, -y, x + w - width, y + h - height) > _OUTSIDE else None


def _is_usable(segmentation: Any, width: int, height: int) -> bool:
    """Whether polygons, or run lengths of the image's size, are given."""
    if isinstance(segmentation, list):
        lines = [line if isinstance(line, list) else [] for line in segmentation]
        return bool(lines) and all(len(line) >= 6 and len(line) % 2 == 0 for line in lines)
    right_size = isinstance(segmentation, dict) and segmentation.get('size') == [height, width]
    return right_size and isinstance(segmentation.get('counts'), (list, str))


def _check_annotations(split: str, images: list, annotations: list, categories: list) -> Findings:
    problem = _category_problem(categories)
    remedy = "classes of your own need metainfo=dict(classes=...) and the heads' num_classes"
    yield Finding(
        split, 'categories', problem or '80, as published', WRONG if problem else OK, remedy
    )
    for name, table in (('image ids', images), ('annotation ids', annotations)):
        counts = Counter(entry['id'] for entry in table)
        twice = (number for number, count in counts.items() if count > 1)
        anew = 'mmdet refuses them: number them anew'
        yield from _listed(split, name, 'occur twice', twice, anew)

    sizes = {image['id']: (image['width'], image['height']) for image in images}
    known = {category['id'] for category in categories}
    faults: dict[str | None, list[str]] = defaultdict(list)
    for ann in annotations:
        where = f'annotation {ann["id"]}'
        if ann['category_id'] not in known:
            faults['category'].append(f'{where} ({ann["category_id"]})')
        if (size := sizes.get(ann['image_id'])) is None:
            faults['image'].append(f'{where} ({ann["image_id"]})')
            continue
        if kind := _box_fault(ann['bbox'], *size):
            faults[kind].append(f'{where} {json.dumps(ann["bbox"]):.40} of image {ann["image_id"]}')
        if not _is_usable(ann.get('segmentation'), *size):
            faults['segmentation'].append(where)
    for kind, (text, status, remedy) in _FAULTS.items():
        yield from _listed(
            split, f'annotations: {kind}', f'{{}} {text}', faults[kind], remedy, status
        )
    if not annotations:
        yield Finding(split, 'annotations', 'there are none', WRONG, 'there is nothing to learn')
    elif not any(faults.values()):
        yield Finding(split, 'annotations', f'{len(annotations)}, consistent')


def _check_coco_split(split: str, folder: Path, ann_file: Path, deep: bool) -> Findings:
    content, problem = load_annotations(ann_file)
    if problem is not None:
        yield Finding(split, ann_file.name, f'{ann_file} {problem}', WRONG, _DOWNLOAD)
        return
    images = content['images']
    yield _count(split, len(images), COCO_IMAGES[split])
    yield from _check_annotations(split, images, content['annotations'], content['categories'])
    sizes = {image['file_name']: (image['height'], image['width']) for image in images}
    there, unpack = set(os.listdir(folder)), f'unpack {split}.zip again'
    missing, extra = sorted(sizes.keys() - there), sorted(there - sizes.keys())
    text = f'{{}} of {len(images)} are not in {folder}'
    yield from _listed(split, 'image files', text, missing, unpack)
    text, remedy = '{} files belong to no entry', 'they are not read'
    yield from _listed(split, 'image files', text, extra, remedy, NOTE)
    items = [(folder / name, size) for name, size in sizes.items() if name in there]
    yield _check_files(split, _coco_image_problem, items, deep, unpack)


def _check_ade20k_split(split: str, images: Path, masks: Path, deep: bool) -> Findings:
    names = {path.stem for path in images.glob('*.jpg')}
    mask_names = {path.stem for path in masks.glob('*.png')}
    unpack = f'unpack {ADE20K_FOLDER}.zip again'
    yield _count(split, len(names), ADE20K_IMAGES[split])
    for what, folder, lonely in (
        ('mask', masks, names - mask_names),
        ('image', images, mask_names - names),
    ):
        text = f'{{}} have no {what} in {folder}'
        yield from _listed(split, 'pairs', text, sorted(lonely), unpack)
    pairs = [(images / f'{n}.jpg', masks / f'{n}.png') for n in sorted(names & mask_names)]
    yield _check_files(split, _ade20k_pair_problem, pairs, deep, unpack)


def check_data(dataset: str, root: Path, deep: bool = False) -> list[Finding]:
    """Check a folder that should be ``'coco'`` or ``'ade20k'``; ``deep`` decodes every file.

    ``root`` may also be the folder above ``ADEChallengeData2016``.
    """
    if not root.is_dir():
        what = 'is a file' if root.exists() else 'does not exist'
        remedy = f'{_DOWNLOAD}; tools/dataset_converters/stand_in.py writes a tiny stand-in'
        return [Finding('Data', str(root), what, WRONG, remedy)]
    if dataset == 'ade20k' and (full := full_ade20k(root)):
        return [Finding('ADE20K', 'release', full, WRONG, f'download {ADE20K_FOLDER}')]
    root = base_folder(root)
    check_split = {'coco': _check_coco_split, 'ade20k': _check_ade20k_split}[dataset]
    findings: list[Finding] = []
    for split, parts in PARTS[dataset].items():
        problems = {part: place_problem(root / part) for part in parts}
        findings += (
            Finding(split, part, f'{root / part} {text}', WRONG, _DOWNLOAD)
            for part, text in problems.items()
            if text is not None
        )
        if not any(problems.values()):
            findings += check_split(split, root / parts[0], root / parts[1], deep)
    return findings
