"""Checks a folder of COCO 2017 or ADE20K and says what is missing or malformed.

Every check returns findings as :mod:`idlevit_mm.engine.doctor` reports them. ``wrong`` is what a
training or its scores would stumble over; ``note`` is what mmdet or mmseg deal with themselves.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    coco_ann_file,
)
from ..errors import one_line, shortened
from .data_layout import (
    INDEX_MODES,
    Place,
    find_parts,
    full_ade20k,
    is_full_ade20k,
    opened,
    read_mask,
)
from .doctor import NOTE, WRONG, Finding


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, int)) and value in (0, 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ''


def _is_anything(value: Any) -> bool:
    return True


_KINDS: Mapping[Callable[[Any], bool], str] = {
    _is_integer: 'a whole number',
    _is_size: 'a whole number above 0',
    _is_number: 'a finite number',
    _is_flag: '0 or 1',
    _is_text: 'text',
}
# What the fields of an annotation file must be; boxes are looked at one by one.
_FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    'images': {'id': _is_integer, 'file_name': _is_text, 'height': _is_size, 'width': _is_size},
    'annotations': {
        'id': _is_integer,
        'image_id': _is_integer,
        'category_id': _is_integer,
        'bbox': _is_anything,
        'area': _is_number,
        'iscrowd': _is_flag,
    },
    'categories': {'id': _is_integer, 'name': _is_text},
}
# Files of a split that are decoded when not all are.
SAMPLE = 200
_NAMED = 3
# COCO rounds coordinates to hundredths; more than this is no rounding.
_OUTSIDE = 1.0
_DOWNLOAD = 'docs/data.md has the commands to download it'


def named(items: Sequence[Any]) -> str:
    """The first few of what is wrong, and how many more there are."""
    return shortened(items, _NAMED)


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
        with opened(io.BytesIO(data)) as picture:
            picture.load()
    return image.shape[0], image.shape[1]


def image_problem(path: Path, size: tuple[int, int] | None = None) -> str | None:
    """What is wrong with an image, if anything.

    Args:
        path: Image file.
        size: Height and width that it should have.
    """
    try:
        found = decoded_size(path)
    except FileNotFoundError:
        return f'{path.name} is missing'
    except OSError as error:
        return f'{path.name}: {one_line(error, 200)}'
    if size is not None and found != size:
        return f'{path.name} is {found[1]}x{found[0]}, not {size[1]}x{size[0]}'
    return None


def mask_problem(mask: Path, image: Path) -> str | None:
    """What is wrong with a mask of ADE20K or its image, if anything."""
    problem = image_problem(image)
    if problem is not None:
        return problem
    try:
        values, mode = read_mask(mask)
    except OSError as error:
        return f'{mask.name}: {one_line(error, 200)}'
    if mode not in INDEX_MODES:
        return f'{mask.name} is of kind {mode}, not one channel of 8 bits (L)'
    size = decoded_size(image)
    if values.shape != size:
        height, width = values.shape
        return f'{mask.name} is {width}x{height}, but its image {size[1]}x{size[0]}'
    if values.max() > ADE20K_CLASSES:
        return f'{mask.name} holds the value {values.max()}, allowed are 0 to {ADE20K_CLASSES}'
    return None


def check_files(
    section: str,
    name: str,
    items: Sequence[Any],
    problem: Callable[[Any], str | None],
    deep: bool,
    remedy: str,
) -> Finding:
    """Look into files, all or a sample, and report those that are wrong.

    Args:
        section: Heading of the finding.
        name: What is looked at.
        items: What ``problem`` takes, one per file.
        problem: Tells what is wrong with one.
        deep: Look into all.
        remedy: What to do about a wrong one.
    """
    chosen = sampled(items, deep)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = track(
            pool.map(problem, chosen),
            description=f'{section}: {name}',
            total=len(chosen),
            transient=True,
        )
        problems = [text for text in results if text is not None]
    seen = f'all {len(chosen)}' if len(chosen) == len(items) else f'{len(chosen)} of {len(items)}'
    if problems:
        value = f'{len(problems)} of {len(chosen)} decoded: {named(problems)}'
        return Finding(section, name, value, WRONG, remedy)
    more = '' if len(chosen) == len(items) else ' (--deep decodes all)'
    return Finding(section, name, f'{seen} decoded{more}')


def _missing_part(section: str, place: Place, root: Path, dataset: str) -> Finding:
    """Finding for a part that is not where it should be."""
    option = f'python tools/prepare_data.py {dataset} --root {root} --convert'
    if place.archive is not None:
        value, remedy = f'still packed in {place.archive}', f'unpack it, or: {option}'
    elif place.found is not None:
        value = f'lies at {place.found} instead of {root / place.part}'
        remedy = f'move it, or link it: {option} --link'
    elif (root / place.part).is_dir() and place.part.endswith('.json'):
        value, remedy = f'{root / place.part} is a folder instead of a file', _DOWNLOAD
    elif (root / place.part).is_file():
        value, remedy = f'{root / place.part} is a file instead of a folder', _DOWNLOAD
    elif (root / place.part).is_dir():
        value, remedy = f'{root / place.part} holds no images', _DOWNLOAD
    else:
        value, remedy = f'{root / place.part} is missing', _DOWNLOAD
    return Finding(section, place.part, value, WRONG, remedy)


def _count(section: str, name: str, found: int, expected: int) -> Finding:
    if found == expected:
        return Finding(section, name, f'{found} images')
    if found < expected:
        remedy = 'scores on a subset cannot be compared with published ones'
        return Finding(section, name, f'{found} images, a subset of {expected}', NOTE, remedy)
    return Finding(
        section,
        name,
        f'{found} images, more than the {expected} of the original',
        NOTE,
        'it was added to',
    )


# ----------------------------------------------------------------------------------------- COCO


def shown(value: Any, limit: int = 40) -> str:
    """A value as JSON writes it, cut off where it is long."""
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + '...'


def load_annotations(path: Path) -> tuple[dict[str, Any], str | None]:
    """An annotation file of COCO, and what is wrong with it as a whole, if anything."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f'cannot be read as JSON ({one_line(error, 200)}): it is cut off or another file'
    if not isinstance(content, dict):
        return {}, f'holds a {type(content).__name__}, not the tables images, annotations, ...'
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(content.get(key), list):
            hint = ': the file names of a test set' if key == 'annotations' else ''
            return {}, f'has no list {key!r}{hint}'
    if any(isinstance(ann, dict) and 'segments_info' in ann for ann in content['annotations']):
        return {}, 'is a panoptic annotation file, not instances'
    for key, fields in _FIELDS.items():
        for number, entry in enumerate(content[key]):
            for name, fits in fields.items():
                if not isinstance(entry, dict) or name not in entry:
                    return {}, f'has an entry without {name!r}: {key}[{number}]'
                if not fits(entry[name]):
                    return {}, (
                        f'has {shown(entry[name])} for {name!r} in {key}[{number}], '
                        f'which must be {_KINDS[fits]}'
                    )
    return content, None


def check_categories(categories: Sequence[dict]) -> str | None:
    """How the categories of an annotation file differ from COCO's 80, if they do."""
    given = [(entry['id'], entry['name']) for entry in categories]
    wanted = [(category.id, category.name) for category in COCO_CATEGORIES]
    if given == wanted:
        return None
    if sorted(given) == wanted:
        return "are COCO's 80, but in another order"
    for mine, theirs in zip(given, wanted, strict=False):
        if mine != theirs:
            return f'{len(given)} categories; first difference: {mine} instead of {theirs}'
    return f'{len(given)} categories instead of 80'


def _repeated(values: Iterable[Any]) -> list[Any]:
    seen, twice = set(), []
    for value in values:
        if value in seen:
            twice.append(value)
        seen.add(value)
    return twice


def _bad_box(box: Any, width: int, height: int) -> str | None:
    """``'malformed'``, ``'zero'`` or ``'outside'``, if a box is one of these."""
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in box):
        return 'malformed'
    x, y, w, h = box
    if w < 1 or h < 1:
        return 'malformed' if w < 0 or h < 0 else 'zero'
    far = (-x, -y, x + w - width, y + h - height)
    return 'outside' if max(far) > _OUTSIDE else None


def _bad_segmentation(segmentation: Any, width: int, height: int) -> bool:
    """Whether neither polygons nor run lengths of the image's size are given."""
    if isinstance(segmentation, list):
        return not segmentation or any(
            not isinstance(line, list) or len(line) < 6 or len(line) % 2 for line in segmentation
        )
    return not (
        isinstance(segmentation, dict)
        and segmentation.get('size') == [height, width]
        and isinstance(segmentation.get('counts'), (list, str))
    )


def check_annotations(section: str, content: dict[str, Any]) -> Iterator[Finding]:
    """Check the tables of an annotation file against each other.

    Args:
        section: Heading of the findings.
        content: As read by :func:`load_annotations`.

    Yields:
        Findings; one for each kind of fault.
    """
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    known = {category['id'] for category in content['categories']}
    problem = check_categories(content['categories'])
    if problem:
        yield Finding(
            section,
            'categories',
            problem,
            WRONG,
            "classes of your own need metainfo=dict(classes=...) in each dataset and the heads' "
            'num_classes; see docs/data.md',
        )
    else:
        yield Finding(section, 'categories', '80, as published')

    twice = _repeated(image['id'] for image in content['images'])
    if twice:
        yield Finding(section, 'image ids', f'occur twice: {named(twice)}', WRONG, _DOWNLOAD)
    twice = _repeated(ann['id'] for ann in content['annotations'])
    if twice:
        remedy = 'mmdet refuses them: number the annotations anew'
        yield Finding(section, 'annotation ids', f'occur twice: {named(twice)}', WRONG, remedy)

    faults: dict[str, list[str]] = {}
    for ann in content['annotations']:
        where = f'annotation {ann["id"]}'
        if ann['category_id'] not in known:
            faults.setdefault('category', []).append(f'{where} ({ann["category_id"]})')
        size = sizes.get(ann['image_id'])
        if size is None:
            faults.setdefault('image', []).append(f'{where} ({ann["image_id"]})')
            continue
        kind = _bad_box(ann['bbox'], *size)
        if kind is not None:
            faults.setdefault(kind, []).append(f'{where} {ann["bbox"]} of image {ann["image_id"]}')
        if _bad_segmentation(ann.get('segmentation'), *size):
            faults.setdefault('segmentation', []).append(where)
    remedies = {
        'category': ('categories referred to do not exist', WRONG, 'mmdet drops these boxes'),
        'image': ('images referred to do not exist', WRONG, 'the file belongs to other images'),
        'malformed': ('boxes are not [x, y, width, height]', WRONG, 'convert them'),
        'outside': (
            'boxes reach outside their image',
            WRONG,
            'are they [x, y, width, height] of images of this size?',
        ),
        'zero': ('boxes are smaller than a pixel', NOTE, 'mmdet leaves them out'),
        'segmentation': (
            'annotations have no usable polygon or run lengths',
            NOTE,
            'mmdet ignores them when it trains masks',
        ),
    }
    for kind, (text, status, remedy) in remedies.items():
        if kind in faults:
            found = faults[kind]
            value = f'{len(found)} {text}: {named(found)}'
            yield Finding(section, f'annotations: {kind}', value, status, remedy)
    if not faults:
        yield Finding(section, 'annotations', f'{len(content["annotations"])}, consistent')
    if not content['annotations']:
        yield Finding(
            section, 'annotations', 'there are none', WRONG, 'mmdet would have nothing to learn'
        )


def _check_coco_split(split: str, folder: Path, ann_file: Path, deep: bool) -> Iterator[Finding]:
    content, problem = load_annotations(ann_file)
    if problem is not None:
        yield Finding(split, ann_file.name, f'{ann_file} {problem}', WRONG, _DOWNLOAD)
        return
    images = content['images']
    yield _count(split, 'images', len(images), COCO_IMAGES[split])
    yield from check_annotations(split, content)
    present = {entry.name for entry in os.scandir(folder)}
    missing = sorted(image['file_name'] for image in images if image['file_name'] not in present)
    if missing:
        value = f'{len(missing)} of {len(images)} are not in {folder}: {named(missing)}'
        yield Finding(split, 'image files', value, WRONG, f'unpack {split}.zip again')
    extra = sorted(present - {image['file_name'] for image in images})
    if extra:
        value = f'{len(extra)} files belong to no entry: {named(extra)}'
        yield Finding(split, 'image files', value, NOTE, 'they are not read')
    there = [
        (folder / image['file_name'], (image['height'], image['width']))
        for image in images
        if image['file_name'] in present
    ]
    yield check_files(
        split,
        'decoding',
        there,
        lambda item: image_problem(*item),
        deep,
        f'unpack {split}.zip again, or take the files out of it',
    )


def check_coco(root: Path, deep: bool = False) -> list[Finding]:
    """Check a folder that should be COCO 2017.

    Args:
        root: Folder that should hold ``train2017``, ``val2017`` and ``annotations``.
        deep: Decode every image instead of a sample.
    """
    findings = []
    places = {place.part: place for place in find_parts('coco', root)}
    for split in COCO_IMAGES:
        parts = (split, coco_ann_file(split))
        wrong = [places[part] for part in parts if places[part].found != root / part]
        findings += [_missing_part(split, place, root, 'coco') for place in wrong]
        panoptic = root / 'annotations' / f'panoptic_{split}.json'
        if any(place.part == parts[1] for place in wrong) and panoptic.is_file():
            findings.append(
                Finding(
                    split,
                    panoptic.name,
                    'only panoptic annotations are here',
                    WRONG,
                    'instances are in annotations_trainval2017.zip (docs/data.md)',
                )
            )
        if not wrong:
            findings += _check_coco_split(split, root / parts[0], root / parts[1], deep)
    return findings


# --------------------------------------------------------------------------------------- ADE20K


def _check_ade20k_split(split: str, root: Path, deep: bool) -> Iterator[Finding]:
    images, masks = root / 'images' / split, root / 'annotations' / split
    names = {path.stem for path in images.glob('*.jpg')}
    mask_names = {path.stem for path in masks.glob('*.png')}
    yield _count(split, 'images', len(names), ADE20K_IMAGES[split])
    for lonely, text, remedy in (
        (names - mask_names, f'have no mask in {masks}', 'mmseg stops at the first of them'),
        (mask_names - names, f'have no image in {images}', f'unpack {ADE20K_FOLDER}.zip again'),
    ):
        if lonely:
            value = f'{len(lonely)} {text}: {named(sorted(lonely))}'
            yield Finding(split, 'pairs', value, WRONG, remedy)
    pairs = [(masks / f'{n}.png', images / f'{n}.jpg') for n in sorted(names & mask_names)]
    yield check_files(
        split,
        'decoding',
        pairs,
        lambda pair: mask_problem(*pair),
        deep,
        f'unpack {ADE20K_FOLDER}.zip again; masks of several equal channels: --convert --link',
    )


def check_ade20k(root: Path, deep: bool = False) -> list[Finding]:
    """Check a folder that should be ADE20K's ``ADEChallengeData2016``, or hold it.

    Args:
        root: Folder with ``images`` and ``annotations``, or the one above.
        deep: Decode every image and mask instead of a sample.
    """
    if is_full_ade20k(root):
        return [Finding('ADE20K', 'release', full_ade20k(root), WRONG, f'download {ADE20K_FOLDER}')]
    if (root / ADE20K_FOLDER).is_dir():
        root = root / ADE20K_FOLDER
    findings = []
    places = {place.part: place for place in find_parts('ade20k', root)}
    for split in ADE20K_IMAGES:
        parts = (f'images/{split}', f'annotations/{split}')
        wrong = [places[part] for part in parts if places[part].found != root / part]
        findings += [_missing_part(split, place, root, 'ade20k') for place in wrong]
        if not wrong:
            findings += _check_ade20k_split(split, root, deep)
    return findings


def check_data(dataset: str, root: Path, deep: bool = False) -> list[Finding]:
    """Check a folder that should be ``'coco'`` or ``'ade20k'``.

    Args:
        dataset: Name of the data set.
        root: Folder.
        deep: Decode every file instead of a sample.
    """
    if not root.is_dir():
        what = 'is a file' if root.exists() else 'does not exist'
        remedy = f'{_DOWNLOAD}; tools/dataset_converters/stand_in.py writes a tiny stand-in'
        return [Finding('Data', str(root), what, WRONG, remedy)]
    return {'coco': check_coco, 'ade20k': check_ade20k}[dataset](root, deep)
