"""Squeeze the windows of a map to their occupied slots, so that idle tokens cost nothing there.

Shape letters: B images, M windows of a map, L slots of a window, T active tokens of an image, R
packed rows of an image (its active tokens, then its summaries), P places, E border windows.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...ops import CACHED_TABLES, window_numbers

# Windows whose numbers of occupied slots round up to the same multiple of this are one bucket.
_STEP = 8


class Bucket(NamedTuple):
    """Windows of one width, whose places lie one after another.

    Attributes:
        first: Place of the first slot of the first window.
        num_windows: Number of windows.
        width: Places of each window.
        num_border: How many windows, the last ones, may hold slots of several regions.
        complete: Whether every window holds all its L slots, in order, and nothing else.
    """

    first: int
    num_windows: int
    width: int
    num_border: int
    complete: bool


class WindowPacking(NamedTuple):
    """Where packed rows stand when the windows of a batch are squeezed to their occupied slots.

    Attributes:
        rows: (P,), number b * R + r of the packed row in each place; B * R in places of padding,
            B * R + 1 in empty ones. Rows of summaries that summarise nothing have none.
        slots: (P,), the slot in each place: 0 to L - 1 in the window, L for a summary, L + 1 where
            the place is empty.
        regions: (P,), the image region of each place of a border window; -1 for summaries, which
            belong to all regions, and everywhere else.
        buckets: The windows by width. Windows without any packed row are in none.
        has_padding: Whether there are places of padding.
    """

    rows: Tensor
    slots: Tensor
    regions: Tensor
    buckets: tuple[Bucket, ...]
    has_padding: bool


def pack_windows(
    token_ids: Tensor | None,
    batch: int,
    hw_shape: tuple[int, int],
    window_size: int,
    shift_size: int,
    summarised: bool = False,
    min_places: int = 1,
) -> WindowPacking:
    """Squeeze the windows of a batch to its active tokens (B, T); all are where there is None.

    A slot is occupied by an active token or by padding, which serves as a key; and each window by
    the summary of its idle tokens, if rows end with one for each window (``summarised``). Buckets
    of fewer than ``min_places`` places are joined with the next wider one.
    """
    if token_ids is None:
        return _pack_all(batch, hw_shape, window_size, shift_size)
    tables = _cell_tables(batch, hw_shape, window_size, shift_size)
    return _pack(token_ids.numpy(), tables, summarised, min_places)


def pack_whole_windows(
    window_ids: Tensor, hw_shape: tuple[int, int], window_size: int, shift_size: int
) -> WindowPacking:
    """Windows, by their numbers (B, K), whose slots are packed one after another already."""
    tables = _cell_tables(1, hw_shape, window_size, shift_size)
    windows = window_ids.flatten().numpy()
    slots = window_size**2
    padding = tables.padding[windows, :slots].reshape(-1)
    rows = np.arange(len(padding))
    regions = tables.regions[:-1].reshape(-1, slots + 1)[windows, :slots]
    bordering = len(windows) if tables.num_border else 0
    return WindowPacking(
        rows=torch.from_numpy(np.where(padding, len(rows), rows)),
        slots=torch.from_numpy(np.tile(np.arange(slots), len(windows))),
        regions=torch.from_numpy(regions.reshape(-1)),
        buckets=(Bucket(0, len(windows), slots, bordering, True),),
        has_padding=bool(padding.any()),
    )


class _CellTables(NamedTuple):
    """What is known of the cells (M * B, L + 1), the slots and the summaries of all windows.

    Images vary fastest among windows, so that the border windows of a batch are the last ones.

    Attributes:
        tokens: (B, N), the cell of each token.
        summaries: (B, M), the cell of each summary.
        padding: (M * B, L + 1), which cells are padding.
        padded: Numbers of the windows that hold padding.
        slots: (M * B * (L + 1) + 1,), the slot of each cell, and L + 1 for an empty place.
        regions: The same for its region, -1 for none.
        num_border: How many windows, the last ones, hold slots of several regions.
    """

    tokens: np.ndarray
    summaries: np.ndarray
    padding: np.ndarray
    padded: np.ndarray
    slots: np.ndarray
    regions: np.ndarray
    num_border: int


@lru_cache(CACHED_TABLES)
def _cell_tables(
    batch: int, hw_shape: tuple[int, int], window_size: int, shift_size: int
) -> _CellTables:
    layout = window_numbers(*hw_shape, window_size, shift_size)
    windows, slots = layout.token_ids.shape
    columns = slots + 1
    border = len(layout.regions)
    image = np.arange(batch)[:, None] * columns
    places = layout.slot_ids
    regions = np.full((windows, batch, columns), -1)
    regions[windows - border :, :, :slots] = layout.regions[:, None]
    padding = np.zeros((windows, batch, columns), dtype=bool)
    padding[:, :, :slots] = (layout.token_ids < 0)[:, None]
    padding = padding.reshape(-1, columns)
    return _CellTables(
        tokens=places // slots * (batch * columns) + places % slots + image,
        summaries=np.arange(windows) * (batch * columns) + slots + image,
        padding=padding,
        padded=np.flatnonzero(padding.any(1)),
        slots=np.append(np.tile(np.arange(columns), windows * batch), columns),
        regions=np.append(regions, -1),
        num_border=border * batch,
    )


@lru_cache(CACHED_TABLES)
def _pack_all(
    batch: int, hw_shape: tuple[int, int], window_size: int, shift_size: int
) -> WindowPacking:
    tables = _cell_tables(batch, hw_shape, window_size, shift_size)
    everything = np.tile(np.arange(tables.tokens.shape[1]), (batch, 1))
    return _pack(everything, tables)


def _pack(
    token_ids: np.ndarray, tables: _CellTables, summarised: bool = False, min_places: int = 1
) -> WindowPacking:
    cells = np.take_along_axis(tables.tokens, token_ids, axis=1)
    occupied = _occupied(cells, tables, summarised)
    if summarised:
        cells = np.concatenate([cells, tables.summaries], axis=1)
    cells = cells.reshape(-1)

    counts = occupied.sum(1)
    widths = _widths(counts, occupied.shape[1] - 1, min_places)
    order = np.argsort(widths, kind='stable')
    starts = np.empty_like(widths)
    starts[order] = np.cumsum(widths[order]) - widths[order]
    taken = np.flatnonzero(occupied)
    places = np.arange(len(taken)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    nothing = occupied.size
    owners = np.full(widths.sum(), nothing)
    owners[places] = taken

    rows = np.full(nothing + 1, len(cells))
    rows[cells] = np.arange(len(cells))
    rows[nothing] = len(cells) + 1
    whole = occupied[:, :-1].all(1) & ~occupied[:, -1]
    return WindowPacking(
        rows=torch.from_numpy(rows[owners]),
        slots=torch.from_numpy(tables.slots[owners]),
        regions=torch.from_numpy(tables.regions[owners]),
        buckets=_buckets(widths, whole, occupied.shape[1] - 1, tables.num_border),
        has_padding=bool(len(tables.padded)),
    )


def _occupied(cells: np.ndarray, tables: _CellTables, summarised: bool) -> np.ndarray:
    """Which cells (M * B, L + 1) have a place; cells (B, T) are those of active tokens."""
    occupied = np.zeros_like(tables.padding)
    occupied.reshape(-1)[cells] = True
    if summarised:
        occupied[:, -1] = ~(occupied | tables.padding)[:, :-1].all(1)
    padded = tables.padded
    occupied[padded] |= tables.padding[padded] & occupied[padded].any(1, keepdims=True)
    return occupied


def _widths(counts: np.ndarray, slots: int, min_places: int) -> np.ndarray:
    """Places for windows of so many occupied slots (W,): a few different numbers."""
    rounded = np.maximum(np.minimum(-(-counts // _STEP) * _STEP, slots), counts)
    numbers = np.bincount(rounded)
    width_of = np.arange(len(numbers))
    present = (np.flatnonzero(numbers[1:]) + 1).tolist()
    joined, windows = [], 0
    for width in present:
        joined.append(width)
        windows += int(numbers[width])
        if windows * width >= min_places or width == present[-1]:
            width_of[joined] = width
            joined, windows = [], 0
    return width_of[rounded]


def _buckets(
    widths: np.ndarray, whole: np.ndarray, slots: int, num_border: int
) -> tuple[Bucket, ...]:
    """Group windows by their width (M * B,), 0 for those that are left out.

    ``whole`` (M * B,) windows hold all their slots and nothing else; the last ``num_border`` lie at
    the border of a shifted map.
    """
    buckets, first = [], 0
    numbers = np.bincount(widths)
    borders = np.bincount(widths[len(widths) - num_border :], minlength=len(numbers))
    num_whole = np.count_nonzero(whole)
    for width in (np.flatnonzero(numbers[1:]) + 1).tolist():
        number = int(numbers[width])
        complete = width == slots and number == num_whole
        buckets.append(Bucket(first, number, width, int(borders[width]), complete))
        first += number * width
    return tuple(buckets)
