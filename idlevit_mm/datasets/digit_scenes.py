"""Digit scenes: a small detection and segmentation data set made of what ships with scikit-learn.

Handwritten digits are upscaled, coloured and alpha-blended on crops of two photographs. Boxes,
instance masks and semantic maps are all derived from one map that says which digit owns each
pixel, so they agree exactly. Digits and photo regions of the two splits are disjoint.

Shape legend: H image height, W image width (pixels).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from rich.progress import track
from sklearn.datasets import load_digits

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
SEMANTIC_CLASSES = ('background', *CLASSES)
_COLOURS = 'e41a1c 377eb8 4daf4a 984ea3 ff7f00 ffff33 a65628 f781bf 00ced1 99ff33'
PALETTE = tuple(tuple(bytes.fromhex(colour)) for colour in _COLOURS.split())
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

_TABLES = 'coco/annotations/instances_{}.json'
_PHOTOS = ('china.jpg', 'flower.jpg')
_VAL_PHOTO_SHARE = 0.3
_VAL_DIGIT_SHARE = 0.25


@dataclass(frozen=True)
class DigitScenesParams:
    """What a digit-scenes data set is made from; equal parameters give equal files.

    Image i of a split depends on nothing but the seed, the split, i, the size and the digits'
    number and scale.

    Args:
        layouts: Any of ``'coco'`` (``coco/{train,val}``, ``coco/annotations``) and ``'ade'``
            (``ade/images``, ``ade/annotations``).
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
        layouts = [self.layouts] if isinstance(self.layouts, str) else list(self.layouts)
        if not layouts or not set(layouts) <= set(LAYOUTS):
            raise ValueError(f'layouts must be one or more of {list(LAYOUTS)}, got {layouts}')
        # One spelling per set of layouts, so that their order makes no other data set.
        object.__setattr__(self, 'layouts', tuple(x for x in LAYOUTS if x in layouts))
        lowest = dict(num_train=1, num_val=1, seed=0, size=MIN_SIDE, num_digits=0)
        for name, low in {**lowest, 'digit_scale': MIN_DIGIT_SCALE}.items():
            number = 2 if name in ('size', 'num_digits', 'digit_scale') else 0
            object.__setattr__(self, name, integers(name, getattr(self, name), number, low))
        digits, scale = self.num_digits, self.digit_scale
        for name, (low, high) in (('num_digits', digits), ('digit_scale', scale)):
            if low > high or high == 0:
                raise ValueError(f'{name} must be min <= max and max > 0, got {low} {high}')
        if scale[1] > min(self.size):
            raise ValueError(
                f'digit_scale must not exceed the shorter side of size {self.size}, got {scale[1]}'
            )
        cover = digits[1] * scale[0] ** 2 / (self.size[0] * self.size[1])
        if digits[1] > 1 and cover > MAX_COVER:
            raise ValueError(
                f'num_digits: {digits[1]} digits of digit_scale {scale[0]} pixels cover '
                f'{cover:.0%} of an image of size {self.size}, at most {MAX_COVER:.0%} is allowed'
            )

    def count(self, split: str) -> int:
        """Number of images of a split."""
        return {'train': self.num_train, 'val': self.num_val}[split]

    def as_dict(self) -> dict[str, Any]:
        """The parameters as JSON reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


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
        return tuple(cv2.boundingRect(self.mask(index)))  # type: ignore[return-value]

    def semantic_map(self) -> np.ndarray:
        """(H, W) uint8 in ADE20K's coding: 1 background, 2..11 digits 0..9; 0 (ignored) unused."""
        codes = np.array([1, *(label + 2 for label in self.labels)], dtype=np.uint8)
        return codes[self.owner]


def write_digit_scenes(
    out_dir: str | os.PathLike[str], *, progress: bool = True, **parameters: Any
) -> bool:
    """Write a digit-scenes data set, unless the same one is already there.

    A marker file holds the parameters and whether writing was finished; an interrupted set is
    written anew. Files that are not part of it are never touched.

    Args:
        out_dir: Folder to write; created if missing.
        progress: Show a progress bar.
        parameters: Of :class:`DigitScenesParams`.

    Returns:
        True if the set was written, False if it was already there.

    Raises:
        ValueError: A parameter is outside what is allowed.
        FileExistsError: The folder holds other files, or a set with other parameters.
    """
    params = DigitScenesParams(**parameters)
    root = Path(out_dir)
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is not a folder')
    about = {'name': 'digit scenes', 'format': FORMAT, 'complete': True}
    about |= {'parameters': params.as_dict()}
    marker = _read_marker(root)
    wanted = [name for split in SPLITS for name in _split_files(params, split)]
    if marker == about and all((root / name).is_file() for name in wanted):
        return False
    present = next((path for path in root.rglob('*') if not path.is_dir()), None)
    if marker is None and present is not None:
        raise FileExistsError(
            f'{root} holds files that no digit-scenes set left there, such as '
            f'{present.relative_to(root).as_posix()!r}; nothing was written, choose another folder'
        )
    if marker is not None and (old := marker['parameters']) != (new := params.as_dict()):
        differing = [f'{k} {old.get(k)} instead of {new[k]}' for k in new if old.get(k) != new[k]]
        raise FileExistsError(
            f'{root} holds a digit-scenes set with other parameters ({", ".join(differing)}); '
            'choose another folder, or delete this one'
        )
    for folder in {(root / name).parent for name in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
    # From here to the last line the marker says "not complete", whatever happens in between.
    _write_marker(root, {**about, 'complete': False})
    contents = chain.from_iterable(_contents(params, split) for split in SPLITS)
    bar = track(contents, 'digit scenes', len(wanted), disable=not progress, transient=True)
    for name, content in bar:
        (root / name).write_bytes(content)
    _write_marker(root, about)
    return True


def render_scene(params: DigitScenesParams, split: str, index: int) -> Scene:
    """Paint one scene: image ``index``, from 0, of split ``'train'`` or ``'val'``.

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
    labels, pool = _digits()[1], []
    for label in range(len(CLASSES)):
        rows = np.flatnonzero(labels == label)
        cut = len(rows) - round(len(rows) * _VAL_DIGIT_SHARE)
        pool.append(rows[:cut] if split == 'train' else rows[cut:])
    return np.sort(np.concatenate(pool))


def photo_columns(split: str, width: int) -> tuple[int, int]:
    """First and past-the-last column of a photo that a split may use."""
    cut = width - round(width * _VAL_PHOTO_SHARE)
    return (0, cut) if split == 'train' else (cut, width)


def encoded(suffix: str, image: np.ndarray) -> bytes:
    """Content of a ``'.jpg'`` or ``'.png'`` file of an image, (H, W, 3) BGR or (H, W) uint8.

    Raises:
        RuntimeError: OpenCV was built without this format.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == '.jpg' else []
    done, data = cv2.imencode(suffix, image, options)
    if not done:
        raise RuntimeError(f'OpenCV cannot encode {suffix} images')
    return data.tobytes()


def integers(name: str, values: Any, number: int, low: int) -> Any:
    """Check that a parameter is so many integers (0: one alone), none below ``low``; returns it.

    Raises:
        ValueError: It is not; the message names it.
    """
    listed = list(values) if number else [values]
    whole = [isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in listed]
    if len(listed) != max(1, number) or not all(whole) or min(listed) < low:
        what = f'{number} integers' if number else 'an integer'
        raise ValueError(f'{name} must be {what} of at least {low}, got {values!r}')
    return tuple(map(int, listed)) if number else int(values)


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
    way = cv2.INTER_AREA if crop_h > height else cv2.INTER_LINEAR
    image = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=way)
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
        areas: list[int] = []
        found = (
            _free_spot(rng, owner, areas, _upscaled(digit_id, scale), scale)
            for digit_id, scale in zip(digit_ids, scales.tolist(), strict=True)
        )
        placed: list[Any] = [*takewhile(lambda spot: spot is not None, found)]
        if len(placed) == len(digit_ids):
            return owner, placed
    raise RuntimeError(f'no place for {len(digit_ids)} digits: lower num_digits or digit_scale')


def _free_spot(
    rng: np.random.Generator, owner: np.ndarray, areas: list[int], patch: np.ndarray, scale: int
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
    ground = cv2.cvtColor(np.ascontiguousarray(view / 255), cv2.COLOR_BGR2LAB)
    ground = ground.reshape(-1, 3).mean(0)
    candidates = rng.random((8, 3), dtype=np.float32)
    lab = cv2.cvtColor(candidates[None], cv2.COLOR_BGR2LAB)[0]
    # Lightness carries the shape; a digit that differs by hue alone is hard for people too.
    distance = np.minimum(np.linalg.norm(lab - ground, axis=1), 2 * np.abs(lab[:, 0] - ground[0]))
    good = np.flatnonzero(distance >= 60)
    return candidates[good[0] if len(good) else int(distance.argmax())] * 255


def _image_files(params: DigitScenesParams, split: str, index: int) -> list[str]:
    """Relative paths of the files of one image."""
    name, ade = f'{index:06d}', {'train': 'training', 'val': 'validation'}[split]
    of_layout = {
        'coco': [f'coco/{split}/{name}.jpg'],
        'ade': [f'ade/images/{ade}/{name}.jpg', f'ade/annotations/{ade}/{name}.png'],
    }
    return [file for layout in params.layouts for file in of_layout[layout]]


def _split_files(params: DigitScenesParams, split: str) -> list[str]:
    """Relative paths of the files of a split."""
    images = [_image_files(params, split, index) for index in range(params.count(split))]
    return [*chain(*images), *([_TABLES.format(split)] if 'coco' in params.layouts else [])]


def _contents(params: DigitScenesParams, split: str) -> Iterator[tuple[str, bytes]]:
    """Relative paths and contents of the files of a split."""
    height, width = params.size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(params.count(split)):
        scene = render_scene(params, split, index)
        pictures = {'.jpg': scene.image, '.png': scene.semantic_map()}
        for name in _image_files(params, split, index):
            yield name, encoded(name[-4:], pictures[name[-4:]])
        name = f'{index:06d}.jpg'
        images.append({'id': index, 'file_name': name, 'height': height, 'width': width})
        for digit, label in enumerate(scene.labels):
            mask = scene.mask(digit)
            # Run lengths, because polygons cannot state a pixel mask exactly.
            rle = mask_utils.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    # COCO's evaluation takes annotation id 0 for "unmatched", so ids start at 1.
                    'id': len(annotations) + 1,
                    'image_id': index,
                    'category_id': label + 1,
                    'bbox': list(scene.box(digit)),
                    'area': int(mask.sum()),
                    'iscrowd': 0,
                    'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
                }
            )
    tables = {
        'info': {'description': f'digit scenes, {split}', 'parameters': params.as_dict()},
        'images': images,
        'annotations': annotations,
        'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(CLASSES)],
    }
    if 'coco' in params.layouts:
        yield _TABLES.format(split), json.dumps(tables, separators=(',', ':')).encode()


def _write_marker(root: Path, marker: dict[str, Any]) -> None:
    # Replaced in one step, so that a crash leaves the old marker or the new one, never half.
    temporary = root / f'{MARKER}.tmp'
    temporary.write_text(json.dumps(marker, indent=2) + '\n')
    temporary.replace(root / MARKER)


def _read_marker(root: Path) -> dict | None:
    """The marker of a digit-scenes set, or None if there is none that can be read."""
    try:
        marker = json.loads((root / MARKER).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    known = isinstance(marker, dict) and marker.get('name') == 'digit scenes'
    return marker if known and isinstance(marker.get('parameters'), dict) else None
