"""Squeeze the windows of a map to their occupied slots, so that idle tokens cost nothing there.

Shape letters: B images, M windows of a map, L slots of a window, T active tokens of an image, R
packed rows of an image (its active tokens, then its summaries), P places, E border windows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import WindowLayout

# Windows whose numbers of occupied slots round up to the same multiple of this are one bucket.
_STEP = 8
_MIN_WINDOWS = 16


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
            B * R + 1 in empty ones.
        slots: (P,), the slot in each place: 0 to L - 1 in the window, L for a summary, L + 1 where
            the place is empty.
        regions: (P,), the image region of each place of a border window; -1 for summaries, which
            belong to all regions, and everywhere else.
        buckets: The windows by width. Windows without any packed row are in none.
        num_rows: B * R. Rows of summaries that summarise nothing have no place.
        has_padding: Whether there are places of padding.
    """

    rows: Tensor
    slots: Tensor
    regions: Tensor
    buckets: tuple[Bucket, ...]
    num_rows: int
    has_padding: bool


def pack_windows(
    layout: WindowLayout, token_slots: Tensor, summarised: bool = False
) -> WindowPacking:
    """Squeeze the windows of a batch.

    A slot is occupied by an active token or by padding, which serves as a key; and each window by
    the summary of its idle tokens, if it has any. Sizes are read back from the device.

    Args:
        layout: The windows of one image.
        token_slots: (B, T), place of each active token in the flattened (M * L) slots.
        summarised: Whether the rows of each image end with a summary for each window.
    """
    batch, num_tokens = token_slots.shape
    windows, slots = layout.token_ids.shape
    columns = slots + 1
    device = token_slots.device
    # Images vary fastest among windows, so that the border windows of a batch are the last ones.
    image = torch.arange(batch, device=device)[:, None]
    cells = (token_slots // slots * batch + image) * columns + token_slots % slots
    if summarised:
        summaries = torch.arange(windows * batch, device=device).view(windows, batch).t()
        cells = torch.cat([cells, summaries * columns + slots], dim=1)
    padding = F.pad(layout.token_ids == len(layout.slot_ids), (0, 1)).repeat_interleave(batch, 0)
    occupied = _occupied(cells[:, :num_tokens], padding, summarised)
    whole = occupied[:, :slots].all(1) & ~occupied[:, slots]
    widths = _widths(occupied.sum(1), slots + int(summarised))

    by_width = widths.sort(stable=True)
    ends = by_width.values.cumsum(0)
    starts = torch.empty_like(ends)
    starts[by_width.indices] = ends - by_width.values
    (taken,) = occupied.flatten().nonzero(as_tuple=True)
    places = (starts[:, None] + occupied.cumsum(1) - 1).flatten()[taken]
    nothing = occupied.numel()
    owners = torch.full((int(ends[-1]),), nothing, device=device)
    owners[places] = taken
    return WindowPacking(
        rows=_rows_of_cells(cells.flatten(), nothing)[owners],
        slots=torch.where(owners < nothing, owners % columns, columns),
        regions=_regions(layout, batch)[owners],
        buckets=_buckets(widths, whole, len(layout.regions) * batch),
        num_rows=cells.numel(),
        has_padding=layout.has_padding,
    )


def pack_whole_windows(layout: WindowLayout, unit_ids: Tensor, batch: int) -> WindowPacking:
    """Windows whose slots are packed one after another already.

    Args:
        layout: The windows of one image.
        unit_ids: (B, K), numbers of the windows.
        batch: B.
    """
    slots = layout.token_ids.shape[1]
    windows = unit_ids.flatten()
    tokens = layout.token_ids[windows].flatten()
    rows = torch.arange(len(tokens), device=tokens.device)
    regions = _regions(layout, 1)[:-1].view(-1, slots + 1)[:, :slots]
    border = len(windows) if len(layout.regions) else 0
    return WindowPacking(
        rows=torch.where(tokens < len(layout.slot_ids), rows, len(rows)),
        slots=torch.arange(slots, device=tokens.device).repeat(len(windows)),
        regions=regions[windows].flatten(),
        buckets=(Bucket(0, len(windows), slots, border, True),),
        num_rows=len(rows),
        has_padding=layout.has_padding,
    )


def _widths(counts: Tensor, most: int) -> Tensor:
    """Places for windows of so many occupied slots (W,), at most ``most``: a few different ones."""
    rounded = (-(-counts // _STEP) * _STEP).clamp(max=most)
    values, inverse, numbers = rounded.unique(return_inverse=True, return_counts=True)
    merged, windows = values.tolist(), numbers.tolist()
    for index, width in enumerate(merged[:-1]):
        # A few windows cost less in the next bucket than in one of their own.
        if width > 0 and windows[index] < _MIN_WINDOWS:
            windows[index + 1] += windows[index]
            merged[index] = None
    for index in reversed(range(len(merged))):
        if merged[index] is None:
            merged[index] = merged[index + 1]
    return torch.tensor(merged, device=counts.device)[inverse]


def _rows_of_cells(cells: Tensor, num_cells: int) -> Tensor:
    """Number of the packed row of each cell, of padding where there is none; empty ones last."""
    rows = torch.full((num_cells + 1,), len(cells), device=cells.device)
    rows[cells] = torch.arange(len(cells), device=cells.device)
    rows[num_cells] = len(cells) + 1
    return rows


def _occupied(cells: Tensor, padding: Tensor, summarised: bool) -> Tensor:
    """Which slots of which windows, and in the last column which summaries, have a place.

    Args:
        cells: (B, T), those of active tokens among the flattened (M * B, L + 1).
        padding: (M * B, L + 1), which slots are padding.
        summarised: Whether there are summaries.
    """
    occupied = torch.zeros_like(padding)
    occupied.view(-1)[cells.flatten()] = True
    if summarised:
        occupied[:, -1] = (~(occupied | padding))[:, :-1].any(1)
    return occupied | (padding & occupied.any(1, keepdim=True))


def _regions(layout: WindowLayout, batch: int) -> Tensor:
    """Region of each of the flattened (M * B, L + 1) cells, then -1 for empty places."""
    windows, slots = layout.token_ids.shape
    border = len(layout.regions)
    regions = layout.token_ids.new_full((windows, batch, slots + 1), -1)
    regions[windows - border :, :, :slots] = layout.regions[:, None]
    return F.pad(regions.flatten(), (0, 1), value=-1)


def _buckets(widths: Tensor, whole: Tensor, num_border: int) -> tuple[Bucket, ...]:
    """Group windows by width.

    Args:
        widths: (M * B,), places of each window, 0 for those that are left out.
        whole: (M * B,), which windows hold all their slots and nothing else.
        num_border: How many windows, the last ones, lie at the border of a shifted map.
    """
    buckets, first = [], 0
    for width in widths.unique().tolist():
        if width == 0:
            continue
        chosen = widths == width
        number = int(chosen.sum())
        border = int(chosen[len(chosen) - num_border :].sum())
        complete = bool(whole[chosen].all())
        buckets.append(Bucket(first, number, width, border, complete))
        first += number * width
    return tuple(buckets)
