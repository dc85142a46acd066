"""Finds the parts of COCO 2017 and ADE20K below a folder, and links or converts them into place.

Nothing that was there is ever deleted or overwritten: what is made is made beside what is there.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from ..errors import BadSampleError, UsageError, one_line, shortened

DATASETS = ('coco', 'ade20k')
# Where the configs look for the data set.
PLACES = {'coco': 'data/coco', 'ade20k': f'data/ade/{ADE20K_FOLDER}'}
MASKS = tuple(f'annotations/{split}' for split in ADE20K_IMAGES)
PARTS = {
    'coco': (*COCO_IMAGES, *map(coco_ann_file, COCO_IMAGES)),
    'ade20k': (*(f'images/{split}' for split in ADE20K_IMAGES), *MASKS),
}
# The archives as they are published, by the beginnings of the parts inside.
ARCHIVES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    'coco': {
        'train2017.zip': ('train2017',),
        'val2017.zip': ('val2017',),
        'annotations_trainval2017.zip': ('annotations/',),
    },
    'ade20k': {f'{ADE20K_FOLDER}.zip': ('images/', 'annotations/')},
}
# Names that only the full release of ADE20K has; its masks number thousands of object names.
_FULL_ADE20K = ('ADE20K_2016_07_26', 'ADE20K_2021_17_01', 'index_ade20k.mat', 'index_ade20k.pkl')
# Pillow's names of pictures whose pixels are one number of 8 bits.
INDEX_MODES = ('L', 'P')
_DEPTH = 4
_SUFFIXES = ('.jpg', '.jpeg', '.png')


@dataclass(frozen=True)
class Place:
    """Where a part of a data set lies.

    Attributes:
        part: Path that the part should have within the data set.
        found: Its folder or file; None if there is none.
        archive: The archive that holds it, where it is not unpacked; else None.
    """

    part: str
    found: Path | None = None
    archive: Path | None = None


def folders_below(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """A folder and those below it, the upper ones first; links are followed."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        deeper = []
        for folder in level:
            with os.scandir(folder) as entries:
                deeper += sorted(Path(entry.path) for entry in entries if entry.is_dir())
        level = deeper


def has_images(folder: Path) -> bool:
    """Whether a picture lies directly in a folder."""
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(_SUFFIXES) for entry in entries)


def find_parts(dataset: str, root: Path) -> list[Place]:
    """Find every part of a data set at or below a folder.

    Args:
        dataset: ``'coco'`` or ``'ade20k'``.
        root: An existing folder.
    """
    folders = list(folders_below(root))
    return [_find(dataset, part, root, folders) for part in PARTS[dataset]]


def _find(dataset: str, part: str, root: Path, folders: list[Path]) -> Place:
    if part.endswith('.json'):
        name = Path(part).name
        for path in (root / part, *(folder / name for folder in folders)):
            if path.is_file():
                return Place(part, path)
    else:
        tail = tuple(part.split('/'))
        for folder in (root / part, *folders):
            # `train2017/train2017/*.jpg` is what unpacking into a folder of that name leaves.
            if folder.parts[-len(tail) :] == tail and folder.is_dir() and has_images(folder):
                return Place(part, folder)
    for name, beginnings in ARCHIVES[dataset].items():
        if part.startswith(beginnings):
            for folder in folders:
                if (folder / name).is_file():
                    return Place(part, archive=folder / name)
    return Place(part)


def is_full_ade20k(root: Path) -> bool:
    """Whether a folder is, or holds, the full release of ADE20K."""
    folders = list(folders_below(root, 2))
    return any(
        folder.name in _FULL_ADE20K or any((folder / name).exists() for name in _FULL_ADE20K)
        for folder in folders
    )


@contextmanager
def opened(file: Path | io.BytesIO) -> Iterator[Image.Image]:
    """A picture that Pillow has opened.

    Raises:
        OSError: For everything that Pillow raises, here or while it is decoded.
    """
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise OSError('is no image') from error
    except (SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError) as error:
        raise OSError(one_line(error)) from error


def read_mask(path: Path) -> tuple[np.ndarray, str]:
    """A mask as mmseg reads it, and Pillow's name of its kind (``'L'`` is 8-bit, one channel).

    Raises:
        OSError: It cannot be read.
    """
    with opened(path) as image:
        return np.asarray(image), image.mode


def exact_mask(values: np.ndarray) -> np.ndarray | None:
    """A mask with one channel of 8 bits that says the same, or None if there is none.

    Args:
        values: (H, W) or (H, W, channels), any integer type. A fourth channel is opacity.

    Returns:
        (H, W) uint8 with values 0 to 150, if all colour channels are equal and within that range.
    """
    if values.ndim == 3:
        colours = values[..., :3] if values.shape[-1] > 2 else values[..., :1]
        if (colours != colours[..., :1]).any():
            return None
        values = colours[..., 0]
    if values.dtype == bool or values.min() < 0 or values.max() > ADE20K_CLASSES:
        return None
    return values.astype(np.uint8)


def _link(source: Path, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())
    return f'linked {target} -> {source.resolve()}'


def _unpack(archive: Path, folder: Path) -> str:
    """Unpack an archive into the folder of a data set; what is there whole stays as it is."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                # ADE20K's archive holds the folder of the data set, COCO's hold what lies in it.
                member.filename = member.filename.removeprefix(f'{ADE20K_FOLDER}/')
                if not member.filename or member.is_dir():
                    continue
                path = folder / member.filename
                if not path.exists():
                    packed.extract(member, folder)
                elif path.stat().st_size != member.file_size:
                    raise UsageError(
                        f'{path} has another size than in {archive}; nothing is overwritten, '
                        'move it away'
                    )
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UsageError(f'{archive} is broken ({error}): download it again') from error
    return f'unpacked {archive} into {folder}'


def _convert_mask(path: Path, target: Path) -> str | None:
    """Link a mask that is right, or write one that can be made right.

    Returns:
        ``'linked'``, ``'written'``, or None if nothing exact can be made of its colours.

    Raises:
        BadSampleError: It cannot be read.
    """
    try:
        values, mode = read_mask(path)
    except OSError as error:
        raise BadSampleError(f'{path.name} ({one_line(error, 200)})') from error
    exact = values if mode in INDEX_MODES else exact_mask(values)
    if exact is None:
        return None
    if exact is values:
        (target / path.name).symlink_to(path.resolve())
        return 'linked'
    Image.fromarray(exact).save(target / path.name)
    return 'written'


def _convert_masks(source: Path, target: Path) -> Iterator[str]:
    """Link the masks that are right, and write those that can be made right."""
    made: dict[str | None, list[str]] = {'linked': [], 'written': [], None: []}
    broken = []
    target.mkdir(parents=True)
    try:
        for path in sorted(source.iterdir()):
            if path.suffix.lower() == '.png':
                try:
                    made[_convert_mask(path, target)].append(path.name)
                except BadSampleError as error:
                    broken.append(str(error))
    except BaseException as error:
        # A full disk, an interrupt: a folder with some of the masks would pass for all of them.
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OSError):
            raise UsageError(f'{target} cannot be written: {one_line(error)}') from error
        raise
    yield (
        f'made {target}: {len(made["linked"])} masks linked, {len(made["written"])} written with '
        'one channel of 8 bits'
    )
    if refused := made[None]:
        yield (
            f'{len(refused)} masks were left out ({shortened(refused)}): their colours are not '
            'numbers of classes, so nothing exact can be made of them'
        )
    if broken:
        yield f'{len(broken)} masks were left out, because they cannot be read: {shortened(broken)}'


def _needs_conversion(folder: Path) -> bool:
    """Whether one of the first masks of a folder has other than one channel of 8 bits."""

    def is_other(path: Path) -> bool:
        try:
            return read_mask(path)[1] not in INDEX_MODES
        except OSError:
            # No conversion mends it; the check names it.
            return False

    return any(map(is_other, sorted(folder.glob('*.png'))[:20]))


def bring_into_place(dataset: str, root: Path, target: Path, convert: bool) -> Iterator[str]:
    """Make the layout that the configs expect, of links to what lies somewhere else.

    Args:
        dataset: ``'coco'`` or ``'ade20k'``.
        root: Folder that holds the data in some form.
        target: Folder of the layout; the same as ``root`` to mend it where it is.
        convert: Also use parts that lie in other places than they should, unpack archives, and
            rewrite masks of several channels where that is exact.

    Yields:
        One line for each thing done.

    Raises:
        UsageError: A part is missing, cannot be used without ``convert``, or its place is taken.
    """
    if dataset == 'ade20k' and is_full_ade20k(root):
        raise UsageError(full_ade20k(root))
    base = root / ADE20K_FOLDER if (root / ADE20K_FOLDER).is_dir() else root
    places = find_parts(dataset, base)
    unpacked = set()
    for place in places:
        if place.found is None and place.archive is None:
            raise UsageError(f'{root} has no {place.part}, nothing was linked')
        if not convert and place.found != base / place.part:
            raise UsageError(
                f'{place.part} is at {place.found or place.archive}: --convert makes use of it'
            )
    for place in places:
        goal = target / place.part
        if place.archive is not None:
            if place.archive not in unpacked:
                unpacked.add(place.archive)
                yield _unpack(place.archive, target)
            continue
        found = place.found
        assert found is not None
        if goal.exists() and goal.resolve() == found.resolve():
            if convert and place.part in MASKS and _needs_conversion(found):
                raise UsageError(
                    f'{goal} cannot be converted where it is, because nothing is overwritten: '
                    'name another folder with --link'
                )
            continue
        if goal.exists() or goal.is_symlink():
            raise UsageError(
                f'{goal} exists already and is not {found}; nothing is overwritten. Choose '
                'another folder with --link, or move it away'
            )
        if convert and place.part in MASKS and _needs_conversion(found):
            yield from _convert_masks(found, goal)
        else:
            yield _link(found, goal)


def full_ade20k(root: Path) -> str:
    """What to say to someone who has the full release of ADE20K."""
    return (
        f'{root} is the full release of ADE20K. Its masks number thousands of object names and '
        'parts; the 150 classes of the benchmark were merged from them by hand and the images '
        f'were resized, so it cannot be converted exactly: download {ADE20K_FOLDER} '
        '(docs/data.md)'
    )
