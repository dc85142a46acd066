"""Index tables that say which tokens of a flat map form a window or a unit.

Shape letters: N tokens of the map (H * W), M windows, L slots of a window (window_size ** 2),
G groups in which a top-k is taken, U units of a group, S tokens of a unit, E border windows.

A table holds ids of tokens, which are rows of the flat map; -1 is padding. Tables depend only on
sizes: the numbers are computed once for each size, and put on each device once.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

# A table of a 200 x 336 map takes about 1 MiB and a detector meets many image sizes.
CACHED_TABLES = 128
_Tables = TypeVar('_Tables')


class WindowLayout(NamedTuple):
    """How the windows of a W-MSA or SW-MSA block lie on the map.

    Windows are numbered row by row, except that the ones which need a region mask (the last row and
    the last column of a shifted layout) come last, so that they are one contiguous slice.

    Attributes:
        token_ids: (M, L), the token in each slot; -1 in padding slots.
        slot_ids: (N,), the place of each token in the flattened (M * L) slots.
        regions: (E, L), number of the image region each slot of the last E windows belongs to; a
            slot sees only slots of its own region. E is 0 without shift.
        has_padding: Whether any slot is padding.
    """

    token_ids: Any
    slot_ids: Any
    regions: Any
    has_padding: bool

    @property
    def window_ids(self) -> Any:
        """Number of the window of each token: (N,)."""
        return self.slot_ids // self.token_ids.shape[1]


class Units(NamedTuple):
    """What can be active or idle, and among which units the best are chosen.

    Attributes:
        token_ids: (G, U, S), the tokens of each unit; -1 is padding.
        valid: For each of the G groups the number of units that hold at least one token.
        num_tokens: N.
        in_order: Whether there is one group whose unit u is token u.
        padded: Whether an active unit may hold padding.
        windows: Size and shift of the windows that units come from; None where they do not.
        inside: (B, N), whether a token belongs to its image; None where all do. Of groups
            ``valid`` is then the largest number in the batch.
    """

    token_ids: Any
    valid: tuple[int, ...]
    num_tokens: int
    in_order: bool
    padded: bool
    windows: Any = None
    inside: Any = None


def on_device(numbers: Callable[..., _Tables]) -> Callable[..., _Tables]:
    """Decorator of a function of sizes: a device comes last, on which its arrays are tensors.

    All calls share them, so never write to them. A table is made of numbers alone, whatever mode is
    on: one that was first wanted in inference mode is usable in training, and fake ones stay with
    the mode that asked for them.
    """

    @torch.compiler.assume_constant_result
    @wraps(numbers)
    def tables(*sizes_and_device: Any) -> _Tables:
        *sizes, device = sizes_and_device
        key = tuple(sizes)
        fake = active_fake_mode() if torch._C._len_torch_dispatch_stack() else None
        # What records a graph of fake tensors, as torch.export does, takes real ones as constants.
        if fake is None or get_proxy_mode() is not None:
            return _shared(numbers, key, device)
        # They refer to the mode, and go with it.
        known, place = vars(fake).setdefault('_idlevit_mm_tables', {}), (numbers, key, device)
        if place not in known:
            real = _tensors(numbers(*key), torch.device('cpu'))
            known[place] = tree_map_only(
                Tensor, lambda x: fake.from_tensor(x, static_shapes=True).to(device), real
            )
        return known[place]

    return tables


@lru_cache(4 * CACHED_TABLES)
def _shared(numbers: Callable[..., Any], key: tuple[Any, ...], device: torch.device) -> Any:
    return _tensors(numbers(*key), device)


def _tensors(tables: Any, device: torch.device) -> Any:
    with _disable_current_modes(), torch.inference_mode(False):
        return tree_map_only(
            np.ndarray,
            lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device),
            tables,
        )


@lru_cache(CACHED_TABLES)
def window_numbers(
    height: int, width: int, window_size: int, shift_size: int, hides_padding: bool = False
) -> WindowLayout:
    """Lay windows over a map, padded bottom and right and rolled up and left by ``shift_size``.

    All sizes are in tokens. Where padding is hidden it is a region of its own.
    """
    rows, row_region = _axis(height, window_size, shift_size)
    cols, col_region = _axis(width, window_size, shift_size)
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    tokens = np.where(inside, rows[:, None] * width + cols[None, :], -1)
    regions = 3 * row_region[:, None] + col_region[None, :]
    if hides_padding:
        regions = np.where(inside, regions, -1)
    # Each (M, L), windows row by row.
    tokens, regions = _partition(tokens, window_size), _partition(regions, window_size)
    bordering = (regions != regions[:, :1]).any(axis=1)
    if bordering.any():
        order = np.argsort(bordering, kind='stable')
        tokens, regions = tokens[order], regions[order]
    flat = tokens.reshape(-1)
    (placed,) = np.nonzero(flat >= 0)
    slot_ids = np.empty(height * width, dtype=np.int64)
    slot_ids[flat[placed]] = placed
    borders = regions[len(regions) - int(bordering.sum()) :]
    return WindowLayout(tokens, slot_ids, borders, flat.size != len(slot_ids))


window_layout = on_device(window_numbers)


@on_device
def map_units(height: int, width: int) -> Units:
    """Every token of the map is a unit and all compete in one group."""
    num_tokens = height * width
    token_ids = np.arange(num_tokens).reshape(1, num_tokens, 1)
    return Units(token_ids, (num_tokens,), num_tokens, True, False)


@on_device
def window_units(height: int, width: int, window_size: int, shift_size: int, whole: bool) -> Units:
    """Units from windows: one group of whole windows, or a group for the tokens of each window."""
    windows = window_numbers(height, width, window_size, shift_size)
    token_ids = windows.token_ids[None] if whole else windows.token_ids[:, :, None]
    valid = (token_ids >= 0).any(axis=2).sum(axis=1)
    padded = whole and windows.has_padding
    sizes = window_size, shift_size
    return Units(token_ids, tuple(valid.tolist()), height * width, False, padded, sizes)


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
