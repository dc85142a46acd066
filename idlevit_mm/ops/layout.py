"""Index tables that say which tokens of a flat map form a window or a unit.

Shape letters: N tokens of the map (H * W), M windows, L slots of a window (window_size ** 2),
G groups in which a top-k is taken, U units of a group, S tokens of a unit, E border windows.

A table holds token ids of the flat map; the *sentinel* id N marks a slot that lies in the padding.
The tables depend only on sizes, so they are built once for each size and device and then shared.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A table of a 200 x 336 map takes about 1 MiB and a detector meets many image sizes.
_CACHED_LAYOUTS = 128


class WindowLayout(NamedTuple):
    """How the windows of a W-MSA or SW-MSA block lie on the map.

    Windows are numbered row by row, except that the ones which need a region mask (the last row and
    the last column of a shifted layout) come last, so that they are one contiguous slice.

    Attributes:
        token_ids: (M, L), the token in each slot; the sentinel N in padding slots.
        slot_ids: (N,), the place of each token in the flattened (M * L) slots.
        regions: (E, L), number of the image region each slot of the last E windows belongs to; a
            slot sees only slots of its own region. E is 0 without shift.
        has_padding: Whether any slot is padding.
    """

    token_ids: Tensor
    slot_ids: Tensor
    regions: Tensor
    has_padding: bool


class UnitLayout(NamedTuple):
    """What can be active or idle, and among which units the best are chosen.

    Attributes:
        token_ids: (G, U, S), the tokens of each unit; the sentinel N marks padding.
        valid_units: For each of the G groups the number of units that hold at least one token.
        num_tokens: N.
        in_order: Whether there is one group whose unit u is token u.
        has_padding: Whether an active unit may hold padding.
    """

    token_ids: Tensor
    valid_units: tuple[int, ...]
    num_tokens: int
    in_order: bool
    has_padding: bool


@torch.compiler.assume_constant_result
def window_layout(
    height: int, width: int, window_size: int, shift_size: int, device: torch.device
) -> WindowLayout:
    """Lay windows over a (height, width) map, padded bottom and right and shifted cyclically.

    Args:
        height: Rows of the map in tokens.
        width: Columns of the map in tokens.
        window_size: Side of a window in tokens.
        shift_size: Tokens by which the padded map is rolled up and left before it is partitioned.
        device: Where the tables live.

    Returns:
        The tables; shared, so never write to them.
    """
    return _window_layout(height, width, window_size, shift_size, device)


@torch.compiler.assume_constant_result
def map_units(height: int, width: int, device: torch.device) -> UnitLayout:
    """Every token of the map is a unit and all compete in one group."""
    return _map_units(height, width, device)


@torch.compiler.assume_constant_result
def window_units(
    height: int,
    width: int,
    window_size: int,
    shift_size: int,
    whole: bool,
    device: torch.device,
) -> UnitLayout:
    """Units from windows: the tokens of each window, or whole windows.

    Args:
        height: Rows of the map in tokens.
        width: Columns of the map in tokens.
        window_size: Side of a window in tokens.
        shift_size: Cyclic shift of the windows in tokens.
        whole: True: one group whose units are windows. False: one group for each window whose units
            are its tokens.
        device: Where the tables live.
    """
    return _window_units(height, width, window_size, shift_size, whole, device)


@lru_cache(_CACHED_LAYOUTS)
def _window_layout(
    height: int, width: int, window_size: int, shift_size: int, device: torch.device
) -> WindowLayout:
    tokens, regions = _window_slots(height, width, window_size, shift_size)
    num_tokens = height * width
    bordering = (regions != regions[:, :1]).any(axis=1)
    if shift_size > 0:
        order = np.argsort(bordering, kind='stable')
        tokens, regions = tokens[order], regions[order]
    flat = tokens.reshape(-1)
    (placed,) = np.nonzero(flat < num_tokens)
    slot_ids = np.empty(num_tokens, dtype=np.int64)
    slot_ids[flat[placed]] = placed
    num_border = int(bordering.sum())
    return WindowLayout(
        token_ids=_table(tokens, device),
        slot_ids=_table(slot_ids, device),
        regions=_table(regions[len(regions) - num_border :], device),
        has_padding=flat.size != num_tokens,
    )


@lru_cache(_CACHED_LAYOUTS)
def _map_units(height: int, width: int, device: torch.device) -> UnitLayout:
    num_tokens = height * width
    token_ids = np.arange(num_tokens).reshape(1, num_tokens, 1)
    return UnitLayout(_table(token_ids, device), (num_tokens,), num_tokens, True, False)


@lru_cache(_CACHED_LAYOUTS)
def _window_units(
    height: int,
    width: int,
    window_size: int,
    shift_size: int,
    whole: bool,
    device: torch.device,
) -> UnitLayout:
    windows = _window_layout(height, width, window_size, shift_size, torch.device('cpu'))
    token_ids = windows.token_ids.numpy()
    num_tokens = height * width
    token_ids = token_ids[None] if whole else token_ids[:, :, None]
    valid = (token_ids < num_tokens).any(axis=2).sum(axis=1)
    has_padding = whole and windows.has_padding
    table = _table(token_ids, device)
    return UnitLayout(table, tuple(valid.tolist()), num_tokens, False, has_padding)


def _window_slots(
    height: int, width: int, window_size: int, shift_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and region numbers of all slots, each (M, L), windows row by row."""
    rows, row_region = _axis(height, window_size, shift_size)
    cols, col_region = _axis(width, window_size, shift_size)
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    tokens = np.where(inside, rows[:, None] * width + cols[None, :], height * width)
    regions = 3 * row_region[:, None] + col_region[None, :]
    return _partition(tokens, window_size), _partition(regions, window_size)


def _axis(length: int, window_size: int, shift_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Map coordinate and region number of each coordinate of the padded, shifted axis."""
    padded = -(-length // window_size) * window_size
    shifted = np.arange(padded)
    region: np.ndarray = np.zeros(padded, dtype=np.int64)
    if shift_size > 0:
        region = (shifted >= padded - window_size).astype(np.int64) + (
            shifted >= padded - shift_size
        )
    return (shifted + shift_size) % padded, region


def _partition(grid: np.ndarray, window_size: int) -> np.ndarray:
    height, width = grid.shape
    blocks = grid.reshape(height // window_size, window_size, width // window_size, window_size)
    return blocks.transpose(0, 2, 1, 3).reshape(-1, window_size * window_size)


def _table(array: np.ndarray, device: torch.device) -> Tensor:
    # A table first built in inference mode would be unusable in a later training step.
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
