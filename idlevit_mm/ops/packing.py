"""Squeeze the windows of a map to their occupied slots, so that idle tokens cost nothing there.

Shape letters: B images, M windows of a map, L slots of a window, T active tokens of an image, R
packed rows of an image (its active tokens, then its summaries), P places, E border windows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import WindowLayout
from .select import take_rows

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
        sources: (P,), number b * R + r of the packed row in each place; any row in places of
            padding and in empty ones.
        places: (B * R,), the place of each packed row; P for summaries that summarise nothing.
        all_placed: Whether every packed row has a place.
        padding: (K,), places of padding.
        slots: (P,), the slot in each place: 0 to L - 1 in the window, L for a summary, L + 1 where
            the place is empty.
        regions: (P,), the image region of each place of a border window; -1 for summaries, which
            belong to all regions, and everywhere else.
        buckets: The windows by width. Windows without any packed row are in none.
    """

    sources: Tensor
    places: Tensor
    all_placed: bool
    padding: Tensor
    slots: Tensor
    regions: Tensor
    buckets: tuple[Bucket, ...]


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

    widths = (-(-occupied.sum(1) // _STEP) * _STEP).clamp(max=slots + int(summarised))
    whole = occupied[:, :slots].all(1) & ~occupied[:, slots]
    by_width = widths.sort(stable=True)
    ends = by_width.values.cumsum(0)
    starts = torch.empty_like(ends)
    starts[by_width.indices] = ends - by_width.values
    total = int(ends[-1])

    place_of = (starts[:, None] + occupied.cumsum(1) - 1).masked_fill(~occupied, total).flatten()
    owners = torch.full((total + 1,), occupied.numel(), device=device)
    owners[place_of] = torch.arange(occupied.numel(), device=device)
    owners[total] = occupied.numel()
    owners = owners[:total]
    rows = torch.zeros(occupied.numel() + 1, dtype=torch.int64, device=device)
    rows[cells.flatten()] = torch.arange(cells.numel(), device=device)
    places = place_of[cells.flatten()]
    return WindowPacking(
        sources=rows[owners],
        places=places,
        all_placed=not summarised or bool((places < total).all()),
        padding=place_of[(padding & occupied).flatten()],
        slots=torch.where(owners < occupied.numel(), owners % columns, columns),
        regions=_regions(layout, batch)[owners],
        buckets=_buckets(widths, whole, len(layout.regions) * batch),
    )


def place_rows(rows: Tensor, blank: Tensor, packing: WindowPacking) -> Tensor:
    """Bring packed rows to their places.

    Args:
        rows: (B * R, C).
        blank: (C,), what stands in places of padding.
        packing: The windows.

    Returns:
        (P, C); in empty places any of the rows, without gradient.
    """
    return _PlaceRows.apply(rows, blank, packing)


def read_rows(placed: Tensor, packing: WindowPacking) -> Tensor:
    """Read packed rows (B * R, C) back from their places (P, C); any value for those without."""
    return take_rows(placed, packing.places, not packing.all_placed)


class _PlaceRows(torch.autograd.Function):
    """A gather in both directions, since each row has at most one place."""

    @staticmethod
    def forward(rows: Tensor, blank: Tensor, packing: WindowPacking) -> Tensor:
        placed = rows.index_select(0, packing.sources)
        return placed.index_copy_(0, packing.padding, blank.expand(len(packing.padding), -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.packing = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        packing = ctx.packing
        places = packing.places
        if packing.all_placed:
            grad_rows = grad.index_select(0, places)
        else:
            grad_rows = grad.index_select(0, places.clamp(max=len(grad) - 1))
            grad_rows[places == len(grad)] = 0.0
        return grad_rows, grad.index_select(0, packing.padding).sum(0), None


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
