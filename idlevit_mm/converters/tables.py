"""Position tables of OpenMMLab's names, resized for other windows and images.

Shape letters: N places of a table, P tokens before the map (1 with class token, 0 without), C
channels, A heads.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints import StateDict
from ..errors import SettingError
from ..layers import relative_position_index, resize_position_table

Size = tuple[int, int]

TABLE_OF_BIAS = 'relative_position_bias_table'
INDEX_OF_BIAS = 'relative_position_index'


class Fitted(NamedTuple):
    """Weights whose tables have the size that was asked for, and (old shape, new shape) of some."""

    state: StateDict
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def index_of_table(key: str, window_size: int) -> StateDict:
    """The index that belongs to a bias table, under its name; it follows from the window alone."""
    prefix = key.removesuffix(TABLE_OF_BIAS)
    return {f'{prefix}{INDEX_OF_BIAS}': relative_position_index(window_size)}


def window_of_table(table: Tensor) -> int:
    """Side of the window of a bias table ((2 * window - 1) ** 2, A); a SettingError without one."""
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0] or side % 2 == 0:
        raise SettingError(
            f'{TABLE_OF_BIAS} has {table.shape[0]} places; allowed: (2 * window_size - 1) ** 2'
        )
    return (side + 1) // 2


def fit_tables(
    state: StateDict,
    shapes: Mapping[str, Size],
    mode: str = 'bicubic',
    window_size: int | None = None,
    num_prefix: int | None = None,
    is_square: bool = False,
) -> Fitted:
    """Resize position tables; one that is not known to be of a square image is left alone.

    Args:
        state: Weights by OpenMMLab's names.
        shapes: Height and width in tokens of absolute tables, by name.
        mode: How absolute tables are interpolated; bias tables are bicubic, as in Swin's release.
        window_size: Side of the window in tokens for bias tables; None leaves them alone.
        num_prefix: P; None where tables never have places but those of the map.
        is_square: Whether absolute tables are known to be those of square images; otherwise one of
            the right number of places is taken to be of the right shape.

    Raises:
        SettingError: A bias table is not that of a square window.
    """
    fitted = dict(state)
    for key, table in state.items():
        if key.endswith(TABLE_OF_BIAS) and window_size is not None:
            own = window_of_table(table)
            if own != window_size:
                old, new = ((2 * side - 1, 2 * side - 1) for side in (own, window_size))
                fitted[key] = resize_position_table(table[None], old, new, 'bicubic')[0]
            fitted |= index_of_table(key, window_size)
        elif key in shapes and table.dim() == 3:
            fitted[key] = _fit_absolute(table, shapes[key], mode, num_prefix, is_square)
    # Indices have no values of their own.
    resized = {
        key: (tuple(table.shape), tuple(fitted[key].shape))
        for key, table in state.items()
        if fitted[key] is not table and not key.endswith(INDEX_OF_BIAS)
    }
    return Fitted(fitted, resized)


def in_tokens(img_size: Size, stride: int) -> Size:
    """Height and width in tokens of an image in pixels; a SettingError if it is below a token."""
    if min(img_size) < stride:
        raise SettingError(f'img_size={img_size} must be at least {stride}, the side of a token')
    return img_size[0] // stride, img_size[1] // stride


def _fit_absolute(
    table: Tensor, shape: Size, mode: str, num_prefix: int | None, is_square: bool
) -> Tensor:
    """Resize a table (1, P + N, C) of a square image; without P, one row too many goes."""
    kept = num_prefix or 0
    if not is_square and table.shape[1] == kept + math.prod(shape):
        return table
    side = math.isqrt(table.shape[1])
    first = table.shape[1] - side * side
    if not kept <= first <= (0 if num_prefix is None else 1):
        return table  # not the table of a square image, or one without class token
    places = resize_position_table(table[:, first:], (side, side), shape, mode)
    return torch.cat([table[:, :kept], places], dim=1)
