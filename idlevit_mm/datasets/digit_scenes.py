"""Digit scenes: a small detection and segmentation data set made of what ships with scikit-learn.

Handwritten digits are upscaled, coloured and alpha-blended on crops of two photographs. Boxes,
instance masks and semantic maps are all derived from one map that says which digit owns each
pixel, so they agree exactly. Digits and photo regions of the two splits are disjoint.

Shape legend: H image height, W image width (pixels).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from rich.progress import track
from sklearn.datasets import load_digits

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
SEMANTIC_CLASSES = ('background', *CLASSES)
PALETTE = (
    (228, 26, 28),
    (55, 126, 184),
    (77, 175, 74),
    (152, 78, 163),
    (255, 127, 0),
    (255, 255, 51),
    (166, 86, 40),
    (247, 129, 191),
    (0, 206, 209),
    (153, 255, 51),
)
SEMANTIC_PALETTE = ((0, 0, 0), *PALETTE)
LAYOUTS = ('coco', 'ade')
SPLITS = ('train', 'val')
MARKER = 'digit_scenes.json'

# Raised whenever the same parameters would give other files than before.
FORMAT = 1

MIN_SIDE = 32
MIN_DIGIT_SCALE = 8
# Random placement of squares jams near 0.56 of the area; below this share it always succeeds.
MAX_COVER = 0.35
MIN_VISIBLE = 0.85

_ADE_SPLITS = {'train': 'training', 'val': 'validation'}
_PHOTOS = ('china.jpg', 'flower.jpg')
_VAL_PHOTO_SHARE = 0.3
_VAL_DIGIT_SHARE = 0.25
_JPEG_QUALITY = 95
_OWN_FILE = re.compile(
    r'digit_scenes\.json(\.tmp)?'
    r'|coco/(train|val)/\d{6,}\.jpg'
    r'|coco/annotations/instances_(train|val)\.json'
    r'|ade/images/(training|validation)/\d{6,}\.jpg'
    r'|ade/annotations/(training|validation)/\d{6,}\.png'
)


@dataclass(frozen=True)
class DigitScenesParams:
    """What a digit-scenes data set is made from; equal parameters give equal files.

    Args:
        layouts: Any of ``'coco'`` and ``'ade'``.
        size: Height and width of every image in pixels, at least 32 each.
        num_train: Number of training images.
        num_val: Number of validation images.
        seed: Seed, non-negative.
        num_digits: Smallest and largest number of digits in an image.
        digit_scale: Smallest and largest height of a digit in pixels.

    Raises:
        ValueError: A value is outside what is allowed.
    """

    layouts: tuple[str, ...] = LAYOUTS
    size: tuple[int, int] = (128, 128)
    num_train: int = 2000
    num_val: int = 400
    seed: int = 0
    num_digits: tuple[int, int] = (1, 5)
    digit_scale: tuple[int, int] = (20, 56)

    def __post_init__(self) -> None:
        if isinstance(self.layouts, str):
            object.__setattr__(self, 'layouts', (self.layouts,))
        unknown = [layout for layout in self.layouts if layout not in LAYOUTS]
        if unknown or not self.layouts:
            raise ValueError(
                f'layouts must be one or more of {list(LAYOUTS)}, got {list(self.layouts)}'
            )
        # One spelling per set of layouts, so that their order makes no other data set.
        object.__setattr__(self, 'layouts', tuple(x for x in LAYOUTS if x in self.layouts))
        for name in ('size', 'num_digits', 'digit_scale'):
            object.__setattr__(self, name, _int_pair(name, getattr(self, name)))
        for name, low in (('num_train', 1), ('num_val', 1), ('seed', 0)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), low))

        if min(self.size) < MIN_SIDE:
            raise ValueError(
                f'size must be at least {MIN_SIDE} in both directions, got {self.size}'
            )
        for name, lowest in (('num_digits', 0), ('digit_scale', MIN_DIGIT_SCALE)):
            low, high = getattr(self, name)
            if not lowest <= low <= high:
                raise ValueError(f'{name} must be {lowest} <= min <= max, got {low} {high}')
        if self.num_digits[1] < 1:
            raise ValueError(f'num_digits must allow at least one digit, got {self.num_digits}')
        if self.digit_scale[1] > min(self.size):
            raise ValueError(
                f'digit_scale must not exceed the shorter image side {min(self.size)}, '
                f'got {self.digit_scale[1]}'
            )
        cover = self.num_digits[1] * self.digit_scale[0] ** 2 / (self.size[0] * self.size[1])
        if self.num_digits[1] > 1 and cover > MAX_COVER:
            raise ValueError(
                f'num_digits: {self.num_digits[1]} digits of digit_scale {self.digit_scale[0]} '
                f'pixels cover {cover:.0%} of an image of size {self.size}, at most '
                f'{MAX_COVER:.0%} is allowed'
            )

    def count(self, split: str) -> int:
        """Number of images of a split."""
        return {'train': self.num_train, 'val': self.num_val}[split]

    def as_dict(self) -> dict[str, object]:
        """The parameters as JSON-ready values."""
        return {
            'layouts': list(self.layouts),
            'size': list(self.size),
            'num_train': self.num_train,
            'num_val': self.num_val,
            'seed': self.seed,
            'num_digits': list(self.num_digits),
            'digit_scale': list(self.digit_scale),
        }


@dataclass(frozen=True)
class Scene:
    """One image with its exact ground truth.

    Attributes:
        image: (H, W, 3) uint8, BGR.
        owner: (H, W) int32, 0 where the photo shows, i + 1 where digit i does.
        labels: Class index 0..9 of every digit, in painting order (later ones lie on top).
        digit_ids: Row of every digit in scikit-learn's data set.
        photo_crop: Photo index, top, left, height and width of the background's source.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: tuple[int, ...]
    digit_ids: tuple[int, ...]
    photo_crop: tuple[int, int, int, int, int]

    def mask(self, index: int) -> np.ndarray:
        """Visible part of one digit, (H, W) uint8 of zeros and ones."""
        return (self.owner == index + 1).astype(np.uint8)

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Tight box (x, y, width, height) of one digit's visible part, in pixels."""
        x, y, width, height = cv2.boundingRect(self.mask(index))
        return x, y, width, height

    def semantic_map(self) -> np.ndarray:
        """(H, W) uint8 in ADE20K's coding: 1 background, 2..11 digits 0..9; 0 (ignored) unused."""
        codes = np.array([1, *(label + 2 for label in self.labels)], dtype=np.uint8)
        return codes[self.owner]


def write_digit_scenes(
    out_dir: str | os.PathLike[str],
    *,
    layouts: Sequence[str] = LAYOUTS,
    size: Sequence[int] = (128, 128),
    num_train: int = 2000,
    num_val: int = 400,
    seed: int = 0,
    num_digits: Sequence[int] = (1, 5),
    digit_scale: Sequence[int] = (20, 56),
    force: bool = False,
    progress: bool = True,
) -> bool:
    """Write a digit-scenes data set, unless the same one is already there.

    A marker file holds the parameters and whether writing was finished; an interrupted set is
    written anew. Files that are not part of a digit-scenes set are never touched.

    Args:
        out_dir: Folder to write; created if missing.
        layouts: Any of ``'coco'`` (``coco/{train,val}``, ``coco/annotations``) and ``'ade'``
            (``ade/images``, ``ade/annotations``).
        size: Height and width of every image in pixels.
        num_train: Number of training images.
        num_val: Number of validation images.
        seed: Seed; image i of a split depends on nothing but the seed, the split, i, the size
            and the digits' number and scale.
        num_digits: Smallest and largest number of digits in an image.
        digit_scale: Smallest and largest height of a digit in pixels.
        force: Replace a digit-scenes set that was written with other parameters.
        progress: Show a progress bar.

    Returns:
        True if the set was written, False if it was already there.

    Raises:
        ValueError: A parameter is outside what is allowed.
        FileExistsError: The folder holds other files, or (without ``force``) a digit-scenes set
            with other parameters.
    """
    params = DigitScenesParams(
        layouts=tuple(layouts) if not isinstance(layouts, str) else (layouts,),
        size=tuple(size),  # type: ignore[arg-type]
        num_train=num_train,
        num_val=num_val,
        seed=seed,
        num_digits=tuple(num_digits),  # type: ignore[arg-type]
        digit_scale=tuple(digit_scale),  # type: ignore[arg-type]
    )
    root = Path(out_dir)
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is not a folder')
    present = set(_files_under(root))
    marker = _read_marker(root)
    if marker == _marker(params, complete=True) and set(_expected_files(params)) <= present:
        return False

    foreign = sorted(name for name in present if not _OWN_FILE.fullmatch(name))
    if foreign or (present and marker is None):
        example = (foreign or sorted(present))[0]
        raise FileExistsError(
            f'{root} holds files that no digit-scenes set left there, such as {example!r}; '
            'nothing was written, choose another folder'
        )
    if marker is not None and marker['parameters'] != params.as_dict() and not force:
        raise FileExistsError(
            f'{root} holds a digit-scenes set with other parameters '
            f'({_differences(marker["parameters"], params.as_dict())}); '
            'choose another folder, or replace it with --force (force=True)'
        )

    root.mkdir(parents=True, exist_ok=True)
    # From here to the last line the marker says "not complete", whatever happens in between.
    _write_marker(root, params, complete=False)
    for name in present - {MARKER}:
        (root / name).unlink()
    total = params.num_train + params.num_val
    steps = _write_scenes(root, params)
    for _ in track(
        steps, description='digit scenes', total=total, disable=not progress, transient=True
    ):
        pass
    _write_marker(root, params, complete=True)
    return True


def render_scene(params: DigitScenesParams, split: str, index: int) -> Scene:
    """Paint one scene; depends on its arguments only.

    Args:
        params: Parameters of the data set; the numbers of images and the layouts play no part.
        split: ``'train'`` or ``'val'``.
        index: Number of the image in its split, from 0.

    Raises:
        ValueError: Unknown split or negative index.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {list(SPLITS)}, got {split!r}')
    if index < 0:
        raise ValueError(f'index must not be negative, got {index}')
    rng = np.random.default_rng([params.seed, SPLITS.index(split), index])
    image, photo_crop = _background(rng, split, params.size)
    pool = digit_pool(split)
    count = int(rng.integers(params.num_digits[0], params.num_digits[1] + 1))
    digit_ids = [int(i) for i in rng.choice(pool, size=count)]
    owner, placed = _place(rng, digit_ids, params)

    # Overlapping strokes blend in float and are rounded once.
    canvas = image.astype(np.float32)
    for alpha, top, left in placed:
        view = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        colour = _contrasting_colour(rng, view, alpha)
        view += alpha[..., None] * (colour - view)
    return Scene(
        image=np.rint(canvas).clip(0, 255).astype(np.uint8),
        owner=owner,
        labels=tuple(int(_digits()[1][i]) for i in digit_ids),
        digit_ids=tuple(digit_ids),
        photo_crop=photo_crop,
    )


def digit_pool(split: str) -> np.ndarray:
    """Rows of scikit-learn's digits that a split may use: the last quarter of a class is val's.

    The rows are in the order of the people who wrote them, so val also shows other hands.
    """
    labels = _digits()[1]
    pool = []
    for label in range(len(CLASSES)):
        rows = np.flatnonzero(labels == label)
        cut = len(rows) - round(len(rows) * _VAL_DIGIT_SHARE)
        pool.append(rows[:cut] if split == 'train' else rows[cut:])
    return np.sort(np.concatenate(pool))


def photo_columns(split: str, width: int) -> tuple[int, int]:
    """First and past-the-last column of a photo that a split may use."""
    cut = width - round(width * _VAL_PHOTO_SHARE)
    return (0, cut) if split == 'train' else (cut, width)


def encoded(suffix: str, image: np.ndarray, options: list[int] | None = None) -> bytes:
    """Content of an image file.

    Args:
        suffix: ``'.jpg'`` or ``'.png'``.
        image: (H, W, 3) BGR or (H, W) uint8.
        options: OpenCV's, of the form ``[cv2.IMWRITE_JPEG_QUALITY, 95]``.

    Raises:
        RuntimeError: OpenCV was built without this format.
    """
    done, data = cv2.imencode(suffix, image, options or [])
    if not done:
        raise RuntimeError(f'OpenCV cannot encode {suffix} images')
    return data.tobytes()


def _integer(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f'{name} must be an integer of at least {low}, got {value!r}')
    return int(value)


def _int_pair(name: str, value: Sequence[int]) -> tuple[int, int]:
    if len(value) != 2:
        raise ValueError(f'{name} must be two integers, got {value!r}')
    return _integer(name, value[0], 0), _integer(name, value[1], 0)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Ink in 0..1, (N, 8, 8) float32, and labels (N,)."""
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


@lru_cache(maxsize=1)
def _photos() -> tuple[np.ndarray, ...]:
    # Read from the package's files: scikit-learn's own loader would need Pillow.
    folder = files('sklearn.datasets.images')
    raw = [np.frombuffer((folder / name).read_bytes(), np.uint8) for name in _PHOTOS]
    return tuple(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)) for data in raw)


def _background(
    rng: np.random.Generator, split: str, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int, int, int, int]]:
    """A random crop of the split's photo region with the image's aspect ratio, resized to it."""
    height, width = size
    which = int(rng.integers(len(_PHOTOS)))
    photo = _photos()[which]
    first, past = photo_columns(split, photo.shape[1])
    largest = min(photo.shape[0] / height, (past - first) / width)
    zoom = largest * np.exp(rng.uniform(np.log(0.2), 0.0))
    crop_h = max(1, min(photo.shape[0], round(zoom * height)))
    crop_w = max(1, min(past - first, round(zoom * width)))
    top = int(rng.integers(photo.shape[0] - crop_h + 1))
    left = int(rng.integers(first, past - crop_w + 1))
    crop = photo[top : top + crop_h, left : left + crop_w]
    # Two photographs would soon be known by heart; mirrored, with colours swapped and another
    # brightness, the same few hundred thousand pixels go further.
    crop = crop[:: rng.choice((-1, 1)), :: rng.choice((-1, 1)), rng.permutation(3)]
    smaller = crop_h > height
    image = cv2.resize(
        np.ascontiguousarray(crop),
        (width, height),
        interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR,
    )
    levels = np.arange(256) * rng.uniform(0.5, 1.2) + rng.uniform(-20, 40)
    image = cv2.LUT(image, np.rint(levels).clip(0, 255).astype(np.uint8))
    return image, (which, top, left, crop_h, crop_w)


def _upscaled(digit_id: int, scale: int) -> np.ndarray:
    """Opacity of a digit of the given height, float32 in 0..1, with a rim of an eighth."""
    # The rim lets the strokes that touch the 8x8 frame fade out instead of being cut.
    padded = np.pad(_digits()[0][digit_id], 1)
    side = round(scale * padded.shape[0] / 8)
    ink = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip((ink - 0.2) / 0.4, 0, 1)


def _place(
    rng: np.random.Generator, digit_ids: list[int], params: DigitScenesParams
) -> tuple[np.ndarray, list[tuple[np.ndarray, int, int]]]:
    """Choose sizes and positions; every digit keeps at least MIN_VISIBLE of its pixels.

    Returns the owner map (H, W) and, per digit, its opacity clipped to the image with the row
    and column of its upper left corner.
    """
    low, high = params.digit_scale
    for attempt in range(200):
        # Crowded images get smaller digits, down to the smallest that was asked for.
        top_scale = low + round((high - low) * 0.9**attempt)
        scales = rng.integers(low, top_scale + 1, size=len(digit_ids))
        owner = np.zeros(params.size, dtype=np.int32)
        placed: list[tuple[np.ndarray, int, int]] = []
        areas: list[int] = []
        for digit_id, scale in zip(digit_ids, scales, strict=True):
            spot = _free_spot(rng, owner, areas, _upscaled(digit_id, int(scale)), int(scale))
            if spot is None:
                break
            placed.append(spot)
        if len(placed) == len(digit_ids):
            return owner, placed
    raise RuntimeError(
        f'{len(digit_ids)} digits found no place in an image of size {params.size}; '
        'lower num_digits or digit_scale'
    )


def _free_spot(
    rng: np.random.Generator,
    owner: np.ndarray,
    areas: list[int],
    patch: np.ndarray,
    scale: int,
) -> tuple[np.ndarray, int, int] | None:
    """Find a place for a patch, then enter it in ``owner`` and ``areas``; None if there is none."""
    height, width = owner.shape
    rim = (patch.shape[0] - scale) // 2
    for _ in range(20):
        # The digit's frame lies inside the image; its rim may be cut by the image border.
        top = int(rng.integers(height - scale + 1)) - rim
        left = int(rng.integers(width - scale + 1)) - rim
        alpha = patch[max(0, -top) : height - top, max(0, -left) : width - left]
        mask = alpha >= 0.5
        y, x = max(0, top), max(0, left)
        view = owner[y : y + mask.shape[0], x : x + mask.shape[1]]
        hidden = np.bincount(view[mask], minlength=len(areas) + 1)[1:]
        visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:] - hidden
        if np.all(visible >= MIN_VISIBLE * np.array(areas)):
            areas.append(int(mask.sum()))
            view[mask] = len(areas)
            return alpha, y, x
    return None


def _contrasting_colour(
    rng: np.random.Generator, view: np.ndarray, alpha: np.ndarray
) -> np.ndarray:
    """A random colour that stands out from what lies under and around the digit, BGR float32."""
    lab_view = cv2.cvtColor(np.ascontiguousarray(view / 255), cv2.COLOR_BGR2LAB)
    ground = lab_view.reshape(-1, 3).mean(0)
    candidates = rng.random((8, 3), dtype=np.float32)
    lab = cv2.cvtColor(candidates[None], cv2.COLOR_BGR2LAB)[0]
    distance = np.linalg.norm(lab - ground, axis=1)
    # Lightness carries the shape; a digit that differs by hue alone is hard for people too.
    distance = np.minimum(distance, 2 * np.abs(lab[:, 0] - ground[0]))
    good = np.flatnonzero(distance >= 60)
    return candidates[good[0] if len(good) else int(distance.argmax())] * 255


def _write_scenes(root: Path, params: DigitScenesParams) -> Iterator[None]:
    """Write all images, then the COCO annotations of their split; yields after each image."""
    for parent in {(root / name).parent for name in _expected_files(params)}:
        parent.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for index in range(params.count(split)):
            scene = render_scene(params, split, index)
            name = f'{index:06d}'
            jpeg = encoded('.jpg', scene.image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            if 'coco' in params.layouts:
                (root / f'coco/{split}/{name}.jpg').write_bytes(jpeg)
                images.append(
                    {
                        'id': index,
                        'file_name': f'{name}.jpg',
                        'height': params.size[0],
                        'width': params.size[1],
                    }
                )
                # COCO's evaluation takes annotation id 0 for "unmatched", so ids start at 1.
                annotations += _coco_annotations(scene, index, first_id=len(annotations) + 1)
            if 'ade' in params.layouts:
                folder = _ADE_SPLITS[split]
                (root / f'ade/images/{folder}/{name}.jpg').write_bytes(jpeg)
                png = encoded('.png', scene.semantic_map())
                (root / f'ade/annotations/{folder}/{name}.png').write_bytes(png)
            yield
        if 'coco' in params.layouts:
            content = {
                'info': {'description': f'digit scenes, {split}', 'parameters': params.as_dict()},
                'images': images,
                'annotations': annotations,
                'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(CLASSES)],
            }
            path = root / f'coco/annotations/instances_{split}.json'
            path.write_text(json.dumps(content, separators=(',', ':')), encoding='utf-8')


def _coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, object]]:
    annotations: list[dict[str, object]] = []
    for index, label in enumerate(scene.labels):
        mask = scene.mask(index)
        rle = mask_utils.encode(np.asfortranarray(mask))
        annotations.append(
            {
                'id': first_id + index,
                'image_id': image_id,
                'category_id': label + 1,
                'bbox': list(scene.box(index)),
                'area': int(mask.sum()),
                'iscrowd': 0,
                # Run lengths, because polygons cannot state a pixel mask exactly.
                'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
            }
        )
    return annotations


def _expected_files(params: DigitScenesParams) -> Iterator[str]:
    yield MARKER
    for split in SPLITS:
        for index in range(params.count(split)):
            if 'coco' in params.layouts:
                yield f'coco/{split}/{index:06d}.jpg'
            if 'ade' in params.layouts:
                yield f'ade/images/{_ADE_SPLITS[split]}/{index:06d}.jpg'
                yield f'ade/annotations/{_ADE_SPLITS[split]}/{index:06d}.png'
        if 'coco' in params.layouts:
            yield f'coco/annotations/instances_{split}.json'


def _files_under(root: Path) -> Iterable[str]:
    """Everything below a folder that is not a folder itself, as relative POSIX paths."""
    for folder, subfolders, names in os.walk(root):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in names + links:
            yield Path(folder, name).relative_to(root).as_posix()


def _marker(params: DigitScenesParams, *, complete: bool) -> dict[str, object]:
    return {
        'name': 'digit scenes',
        'format': FORMAT,
        'complete': complete,
        'parameters': params.as_dict(),
    }


def _write_marker(root: Path, params: DigitScenesParams, *, complete: bool) -> None:
    # Replaced in one step, so that a crash leaves the old marker or the new one, never half.
    temporary = root / f'{MARKER}.tmp'
    temporary.write_text(json.dumps(_marker(params, complete=complete), indent=2) + '\n')
    temporary.replace(root / MARKER)


def _read_marker(root: Path) -> dict | None:
    """The marker of a digit-scenes set, or None if there is none that can be read."""
    try:
        marker = json.loads((root / MARKER).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    known = isinstance(marker, dict) and marker.get('name') == 'digit scenes'
    return marker if known and isinstance(marker.get('parameters'), dict) else None


def _differences(old: dict, new: dict) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ', '.join(f'{name} {old.get(name)} instead of {new.get(name)}' for name in names)
