"""Painting of digit scenes: handwritten digits on crops of two photographs, with exact masks.

Everything that tells about a scene is derived from one map that says which digit owns each pixel.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from sklearn import datasets

LAYOUTS = ('coco', 'ade')
SPLITS = ('train', 'val')
MIN_SIDE = 32
MIN_DIGIT_SCALE = 8
# Random placement of squares jams near 0.56 of the area; below this share it always succeeds.
MAX_COVER = 0.35
MIN_VISIBLE = 0.85
_PHOTOS = files(datasets) / 'images'
_VAL_PHOTO_SHARE = 0.3
_VAL_DIGIT_SHARE = 0.25


@dataclass(frozen=True)
class DigitScenesParams:
    """What a digit-scenes data set is made from; equal parameters give equal files.

    Image i of a split depends on nothing but the seed, the split, i, the size and the digits'
    number and scale.

    Raises:
        ValueError: A value is outside what is allowed.
    """

    layouts: tuple[str, ...] = LAYOUTS  # folders ``coco`` and ``ade``
    size: tuple[int, int] = (128, 128)  # height and width of every image in pixels
    num_train: int = 2000
    num_val: int = 400
    seed: int = 0
    num_digits: tuple[int, int] = (1, 5)  # smallest and largest number in an image
    digit_scale: tuple[int, int] = (20, 56)  # smallest and largest height in pixels

    def __post_init__(self) -> None:
        layouts = [self.layouts] if isinstance(self.layouts, str) else list(self.layouts)
        if not layouts or not set(layouts) <= set(LAYOUTS):
            raise ValueError(f'layouts must be one or more of {list(LAYOUTS)}, got {layouts}')
        # One spelling per set of layouts, so that their order makes no other data set.
        object.__setattr__(self, 'layouts', tuple(x for x in LAYOUTS if x in layouts))
        pairs = dict(size=MIN_SIDE, num_digits=0, digit_scale=MIN_DIGIT_SCALE)
        for name, low in dict(num_train=1, num_val=1, seed=0, **pairs).items():
            shape = (2,) if name in pairs else ()
            object.__setattr__(self, name, integers(name, getattr(self, name), low, shape))
        digits, scale = self.num_digits, self.digit_scale
        for name, (low, high) in dict(num_digits=digits, digit_scale=scale).items():
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


@dataclass(frozen=True)
class Scene:
    """One image with its exact ground truth."""

    image: np.ndarray  # (H, W, 3) uint8, BGR
    owner: np.ndarray  # (H, W) int32, 0 where the photo shows, i + 1 where digit i does
    labels: tuple[int, ...]  # of every digit, in painting order: later ones lie on top
    digit_ids: tuple[int, ...]  # rows in scikit-learn's data set
    photo_crop: tuple[int, int, int, int, int]  # photo, top, left, height and width of the ground

    def mask(self, index: int) -> np.ndarray:
        """Visible part of one digit, (H, W) uint8 of zeros and ones."""
        return (self.owner == index + 1).astype(np.uint8)

    def box(self, index: int) -> tuple[int, ...]:
        """Tight box (x, y, width, height) of one digit's visible part, in pixels."""
        return tuple(cv2.boundingRect(self.mask(index)))

    def semantic_map(self) -> np.ndarray:
        """(H, W) uint8 in ADE20K's coding: 1 background, 2..11 digits 0..9; 0 (ignored) unused."""
        codes = np.array([1, *(label + 2 for label in self.labels)], dtype=np.uint8)
        return codes[self.owner]


def render_scene(params: DigitScenesParams, split: str, index: int) -> Scene:
    """Paint one scene: image ``index``, from 0, of split ``'train'`` or ``'val'``."""
    rng = np.random.default_rng([params.seed, SPLITS.index(split), index])
    image, photo_crop = _background(rng, split, params.size)
    count = int(rng.integers(params.num_digits[0], params.num_digits[1] + 1))
    digit_ids = rng.choice(digit_pool(split), size=count).tolist()
    owner, placed = _place(rng, digit_ids, params)

    # Overlapping strokes blend in float and are rounded once.
    canvas = image.astype(np.float32)
    for alpha, top, left in placed:
        view = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        colour = _contrasting_colour(rng, view)
        view += alpha[..., None] * (colour - view)
    return Scene(
        image=np.rint(canvas).clip(0, 255).astype(np.uint8),
        owner=owner,
        labels=tuple(_digits()[1][digit_ids].tolist()),
        digit_ids=tuple(digit_ids),
        photo_crop=photo_crop,
    )


def digit_pool(split: str) -> np.ndarray:
    """Rows of scikit-learn's digits that a split may use: the last quarter of a class is val's.

    The rows are in the order of the people who wrote them, so val also shows other hands.
    """
    found = []
    for label in range(10):
        rows = np.flatnonzero(_digits()[1] == label)
        cut = len(rows) - round(len(rows) * _VAL_DIGIT_SHARE)
        found.append(rows[:cut] if split == 'train' else rows[cut:])
    return np.sort(np.concatenate(found))


def photo_columns(split: str, width: int) -> tuple[int, int]:
    """First and past-the-last column of a photo that a split may use."""
    cut = width - round(width * _VAL_PHOTO_SHARE)
    return (0, cut) if split == 'train' else (cut, width)


def integers(name: str, values: Any, low: int, shape: tuple[int, ...] = ()) -> Any:
    """Check that a parameter is an integer, or so many, none below ``low``; returns it.

    Raises:
        ValueError: It is not; the message names it.
    """
    array = np.asarray(values)
    if array.shape != shape or array.dtype.kind not in 'iu' or array.min() < low:
        what = f'{shape[0]} integers' if shape else 'an integer'
        raise ValueError(f'{name} must be {what} of at least {low}, got {values!r}')
    return tuple(array.tolist()) if shape else int(array)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Ink in 0..1, (N, 8, 8) float32, and labels (N,)."""
    digits = datasets.load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


@lru_cache(maxsize=1)
def _photos() -> tuple[np.ndarray, ...]:
    # Not by scikit-learn's loader, which leaves the decoding to Pillow.
    names = ('china.jpg', 'flower.jpg')
    return tuple(np.asarray(cv2.imread(str(_PHOTOS / name))) for name in names)


def _background(
    rng: np.random.Generator, split: str, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int, int, int, int]]:
    """A random crop of the split's photo region with the image's aspect ratio, resized to it."""
    height, width = size
    which = int(rng.integers(len(_photos())))
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
        scales = rng.integers(low, top_scale + 1, size=len(digit_ids)).tolist()
        owner = np.zeros(params.size, dtype=np.int32)
        areas: list[int] = []
        placed: list[tuple[np.ndarray, int, int]] = []
        for digit_id, scale in zip(digit_ids, scales, strict=True):
            if spot := _free_spot(rng, owner, areas, _upscaled(digit_id, scale), scale):
                placed.append(spot)
            else:
                break
        else:
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


def _contrasting_colour(rng: np.random.Generator, view: np.ndarray) -> np.ndarray:
    """A random colour that stands out from what lies under and around the digit, BGR float32."""
    ground = cv2.cvtColor(np.ascontiguousarray(view / 255), cv2.COLOR_BGR2LAB)
    ground = ground.reshape(-1, 3).mean(0)
    candidates = rng.random((8, 3), dtype=np.float32)
    lab = cv2.cvtColor(candidates[None], cv2.COLOR_BGR2LAB)[0]
    # Lightness carries the shape; a digit that differs by hue alone is hard for people too.
    distance = np.minimum(np.linalg.norm(lab - ground, axis=1), 2 * np.abs(lab[:, 0] - ground[0]))
    good = np.flatnonzero(distance >= 60)
    return candidates[good[0] if len(good) else int(distance.argmax())] * 255
