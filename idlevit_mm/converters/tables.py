"""Position tables of OpenMMLab's names, resized for other windows and images.

Shape letters: N places of a table, P tokens before the map (1 with class token, 0 without), C
channels, A heads.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints import StateDict
from ..errors import SettingError
from ..layers import (
    relative_position_index,
    resize_position_table,
    resize_relative_position_table,
)

Size = tuple[int, int]

TABLE_OF_BIAS = 'relative_position_bias_table'
_PVT_TABLE = re.compile(r'layers\.(\d+)\.1\.0\.pos_embed')


class Fitted(NamedTuple):
    """Weights whose tables have the size that was asked for.

    Attributes:
        state: The weights.
        resized: Tables that were interpolated: (old shape, new shape).
    """

    state: StateDict
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def window_of_table(table: Tensor) -> int:
    """Side of the window that a bias table ((2 * window - 1) ** 2, A) belongs to.

    Raises:
        SettingError: The table is not that of a square window.
    """
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0] or side % 2 == 0:
        raise SettingError(
            f'{TABLE_OF_BIAS} has {table.shape[0]} places; allowed: (2 * window_size - 1) ** 2'
        )
    return (side + 1) // 2


def fit_swin(
    state: StateDict, window_size: int | None = None, pos_shape: Size | None = None
) -> Fitted:
    """Resize Swin's bias tables (bicubic, as the release does) and its absolute table.

    Args:
        state: Weights by OpenMMLab's names.
        window_size: Side of the window in tokens; None leaves tables and indices alone.
        pos_shape: Height and width of the absolute table in tokens; None leaves it alone.

    Raises:
        SettingError: A bias table is not that of a square window.
    """
    fitted = dict(state)
    for key, table in state.items():
        if key.endswith(TABLE_OF_BIAS) and window_size is not None:
            if window_of_table(table) != window_size:
                places = (2 * window_size - 1) ** 2
                fitted[key] = resize_relative_position_table(table, places)
            index = key.removesuffix(TABLE_OF_BIAS) + 'relative_position_index'
            fitted[index] = relative_position_index(window_size)
        elif key == 'absolute_pos_embed' and pos_shape is not None:
            fitted[key] = _fit_square(table, pos_shape, 'bicubic')
    return _compared(state, fitted)


def fit_pvt(state: StateDict, pos_shapes: dict[int, Size]) -> Fitted:
    """Resize PVT's position tables (bilinear).

    Args:
        state: Weights by OpenMMLab's names.
        pos_shapes: Height and width of the table of each stage in tokens.
    """
    fitted = dict(state)
    for key, table in state.items():
        match = _PVT_TABLE.fullmatch(key)
        if match and int(match[1]) in pos_shapes:
            fitted[key] = _fit_square(table, pos_shapes[int(match[1])], 'bilinear')
    return _compared(state, fitted)


def fit_vit(
    state: StateDict, pos_shape: Size, num_prefix: int, mode: str, is_square: bool
) -> Fitted:
    """Resize the position table of a plain vision transformer.

    Args:
        state: Weights by OpenMMLab's names.
        pos_shape: Height and width of the table in tokens.
        num_prefix: P.
        mode: How to interpolate.
        is_square: Whether the table is known to be that of a square image; one of the right number
            of places is otherwise taken to be of the right shape.
    """
    table = state.get('pos_embed')
    if table is None or table.dim() != 3:
        return Fitted(state, {})
    if not is_square and table.shape[1] == num_prefix + math.prod(pos_shape):
        return Fitted(state, {})
    side = math.isqrt(table.shape[1])
    first = table.shape[1] - side * side
    if first > 1 or first < num_prefix:
        return Fitted(state, {})  # not the table of a square image, or one without class token
    places = resize_position_table(table[:, first:], (side, side), pos_shape, mode)
    return _compared(
        state, {**state, 'pos_embed': torch.cat([table[:, :num_prefix], places], dim=1)}
    )


def swin_pos_shape(state: StateDict, img_size: Size) -> Size:
    """Height and width of Swin's absolute table for images of a size in pixels."""
    return _divided(img_size, state['patch_embed.projection.weight'].shape[-1])


def pvt_pos_shapes(state: StateDict, img_size: Size) -> dict[int, Size]:
    """Height and width of the table of each stage of PVT for images of a size in pixels."""
    shapes, stride, stage = {}, 1, 0
    while (weight := state.get(f'layers.{stage}.0.projection.weight')) is not None:
        stride *= weight.shape[-1]
        shapes[stage] = _divided(img_size, stride)
        stage += 1
    return shapes


def vit_pos_shape(state: StateDict, img_size: Size) -> Size:
    """Height and width of a plain ViT's table for images of a size in pixels."""
    # The stem of LV-ViT halves the image before the patches are embedded.
    stride = 2 if 'patch_embed.stem.0.weight' in state else 1
    return _divided(img_size, stride * state['patch_embed.projection.weight'].shape[-1])


def _divided(img_size: Size, stride: int) -> Size:
    if min(img_size) < stride:
        raise SettingError(f'img_size={img_size} must be at least {stride}, the side of a token')
    return img_size[0] // stride, img_size[1] // stride


def _fit_square(table: Tensor, shape: Size, mode: str) -> Tensor:
    """Resize the table (1, N, C) of a square image unless it has the right number of places."""
    side = math.isqrt(table.shape[1]) if table.dim() == 3 else 0
    if table.dim() != 3 or table.shape[1] == math.prod(shape) or side * side != table.shape[1]:
        return table
    return resize_position_table(table, (side, side), shape, mode)


def _compared(old: StateDict, new: StateDict) -> Fitted:
    """Tell which tables changed; indices have no values of their own."""
    return Fitted(
        new,
        {
            key: (tuple(old[key].shape), tuple(value.shape))
            for key, value in new.items()
            if key in old and value is not old[key] and not key.endswith('relative_position_index')
        },
    )
