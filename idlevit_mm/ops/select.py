"""Choose the best units and move their tokens out of the flat map and back.

Shape letters: B images, N tokens of the map, C channels, G groups, U units of a group, S tokens of
a unit, T active tokens (or slots, where a unit holds padding).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import UnitLayout
from .runtime import eager_on_cpu


class Selection(NamedTuple):
    """The units of one block that are active.

    Attributes:
        token_ids: (B, T), ids of the active tokens in the flat map; within a group ascending. The
            sentinel N marks a padding slot of an active window.
        unit_ids: (B, K), numbers of the active units.
        has_padding: Whether token_ids may hold the sentinel.
    """

    token_ids: Tensor
    unit_ids: Tensor
    has_padding: bool


ROUNDINGS: dict[str, Callable[[float], int]] = {
    'nearest': round,
    'floor': math.floor,
    'ceil': math.ceil,
}


def num_active(keep_ratio: float, num_units: int, rounding: str = 'nearest') -> int:
    """Number of active units: max(1, rounded keep_ratio * num_units)."""
    return max(1, ROUNDINGS[rounding](keep_ratio * num_units))


def unit_scores(scores: Tensor, layout: UnitLayout, reduction: str = 'mean') -> Tensor:
    """Score of a unit: the mean over its tokens, or their L2 norm.

    Args:
        scores: (B, N).
        layout: Units of the map.
        reduction: ``mean`` or ``l2``; padding counts for neither.

    Returns:
        (B, G, U); minus infinity for units that are all padding.
    """
    if layout.in_order:
        return scores[:, None, :]
    slots = F.pad(scores, (0, 1), value=float('-inf'))[:, layout.token_ids]
    if layout.token_ids.shape[2] == 1:
        return slots.squeeze(-1)
    valid = layout.token_ids < layout.num_tokens
    slots = torch.where(valid, slots, 0.0)
    count = valid.sum(-1)
    if reduction == 'l2':
        total = torch.linalg.vector_norm(slots, dim=-1)
    else:
        total = slots.sum(-1) / count.clamp(min=1)
    return torch.where(count > 0, total, float('-inf'))


def select_units(
    scores: Tensor, layout: UnitLayout, keep_ratio: float, rounding: str = 'nearest'
) -> Selection:
    """Take the best ``num_active`` units of every group.

    Args:
        scores: (B, G, U), minus infinity for units that are all padding.
        layout: Units of the map.
        keep_ratio: Share of the valid units that is active, in (0, 1].
        rounding: How the number of active units is rounded; one of ``ROUNDINGS``.
    """
    counts = tuple(num_active(keep_ratio, valid, rounding) for valid in layout.valid_units)
    unit_ids = _top_units(scores, counts)
    tokens = unit_ids if layout.in_order else _tokens_of(unit_ids, layout)
    return Selection(tokens, unit_ids, layout.has_padding)


def best_places(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` highest of (B, N) scores in each row, ascending: (B, count)."""
    return _ascending(scores.topk(count, dim=-1, sorted=False).indices, scores.shape[-1])


def _ascending(places: Tensor, num_places: int) -> Tensor:
    """Sort rows of distinct places (..., K) below ``num_places``."""
    if not eager_on_cpu(places):
        return places.sort(dim=-1).values
    marks = places.new_zeros(*places.shape[:-1], num_places, dtype=torch.bool)
    found = marks.scatter_(-1, places, True).flatten().nonzero().view(places.shape)
    return found if found.numel() == found.shape[-1] else found % num_places


def _tokens_of(unit_ids: Tensor, layout: UnitLayout) -> Tensor:
    """Tokens of the units (B, K), padding included: (B, K * S)."""
    return layout.token_ids.flatten(0, 1)[unit_ids].flatten(1)


def behind_prefix(token_ids: Tensor, count: int) -> Tensor:
    """Ids of the map (B, K) as ids behind a prefix, which comes first: (B, count + K)."""
    prefix = torch.arange(count, device=token_ids.device).expand(token_ids.shape[0], -1)
    return torch.cat([prefix, token_ids + count], dim=1)


def keep_mask(selection: Selection, num_tokens: int) -> Tensor:
    """Which tokens are active: (B, N), bool."""
    token_ids = selection.token_ids
    mask = token_ids.new_zeros(token_ids.shape[0], num_tokens + 1, dtype=torch.bool)
    return mask.scatter_(1, token_ids, True)[:, :num_tokens]


def take_tokens(x: Tensor, selection: Selection) -> Tensor:
    """Gather the active tokens.

    Args:
        x: (B, N, C).
        selection: Active units of each image.

    Returns:
        (B, T, C); rows of padding slots hold values of some token and must not be used.
    """
    batch, num_tokens, channels = x.shape
    rows = _rows(selection, batch, num_tokens)
    take = _TakeRows.apply if torch.is_grad_enabled() else _TakeRows.forward
    taken = take(x.reshape(batch * num_tokens, channels), rows, selection.has_padding)
    return taken.view(batch, -1, channels)


def put_tokens(x: Tensor, selection: Selection, values: Tensor) -> Tensor:
    """Copy the map with the active tokens replaced; the inverse of ``take_tokens``.

    Args:
        x: (B, N, C).
        selection: Active units of each image.
        values: (B, T, C), new values of the active tokens; those of padding slots are dropped.

    Returns:
        (B, N, C), whose idle rows are bit-identical to those of ``x``.
    """
    batch, num_tokens, channels = x.shape
    rows = _rows(selection, batch, num_tokens)
    flat = x.reshape(batch * num_tokens, channels)
    if selection.has_padding:
        flat = F.pad(flat, (0, 0, 0, 1))
    values = values.reshape(-1, channels).to(x.dtype)
    return flat.index_copy(0, rows, values)[: batch * num_tokens].view(batch, num_tokens, channels)


def fill_map(blank: Tensor, num_tokens: int, selection: Selection, values: Tensor) -> Tensor:
    """A map of nothing but blank and the active tokens, without gradient.

    Args:
        blank: (B, 1, C), what stands in the places of idle tokens.
        num_tokens: N.
        selection: Active units of each image, none of which is padding.
        values: (B, T, C), the active tokens.

    Returns:
        (B, N, C).
    """
    batch, _, channels = blank.shape
    filled = blank.expand(-1, num_tokens, -1).clone(memory_format=torch.contiguous_format)
    rows = _rows(selection, batch, num_tokens)
    filled.view(-1, channels).index_copy_(0, rows, values.reshape(-1, channels))
    return filled


class _TakeRows(torch.autograd.Function):
    """index_select over distinct rows, whose backward copies rows instead of adding them.

    Autograd's own backward is an index_add, several times slower on the CPU and not deterministic
    on a GPU. The row after the last stands for padding: it reads any row and gives no gradient.
    """

    @staticmethod
    def forward(rows: Tensor, index: Tensor, has_padding: bool) -> Tensor:
        return rows.index_select(0, index.clamp(max=rows.shape[0] - 1) if has_padding else index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, index, has_padding = inputs
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        ctx.has_padding = has_padding

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        full = grad.new_zeros(ctx.num_rows + int(ctx.has_padding), grad.shape[1])
        return full.index_copy(0, index, grad)[: ctx.num_rows], None, None


def _rows(selection: Selection, batch: int, num_tokens: int) -> Tensor:
    """Rows of the active tokens in the flattened (B * N) map; B * N for padding slots."""
    token_ids = selection.token_ids
    rows = token_ids
    if batch > 1:
        rows = rows + torch.arange(batch, device=rows.device)[:, None] * num_tokens
    if selection.has_padding:
        rows = torch.where(token_ids == num_tokens, batch * num_tokens, rows)
    return rows.flatten()


def _top_units(scores: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Numbers g * U + u of the best ``counts[g]`` units of each group: (B, sum(counts))."""
    _, groups, units = scores.shape
    most = max(counts)
    uneven = min(counts) < most
    top = scores.topk(most, dim=-1, sorted=uneven).indices
    if uneven:
        # Groups at the border of the map hold fewer units: what they have too many sorts last.
        tables = _count_tables(counts, scores.device)
        ranks = torch.arange(most, device=scores.device)
        top = torch.where(ranks < tables.limits[:, None], top, units)
    first = torch.arange(groups, device=scores.device) * units
    top = top.sort(dim=-1).values if uneven else _ascending(top, units)
    top = (top + first[:, None]).flatten(1)
    return top[:, tables.places] if uneven else top


class _CountTables(NamedTuple):
    """How many units each group keeps.

    Attributes:
        limits: (G,), the counts.
        places: Places of the first ``limits[g]`` entries of row g in a flattened (G, max) table.
    """

    limits: Tensor
    places: Tensor


@torch.compiler.assume_constant_result
def _count_tables(counts: tuple[int, ...], device: torch.device) -> _CountTables:
    return _cached_count_tables(counts, device)


@lru_cache(64)
def _cached_count_tables(counts: tuple[int, ...], device: torch.device) -> _CountTables:
    limits = np.array(counts, dtype=np.int64)
    (places,) = np.nonzero((np.arange(limits.max()) < limits[:, None]).reshape(-1))
    # Built outside inference mode, so that a later training step can use them too.
    with torch.inference_mode(False):
        return _CountTables(*(torch.from_numpy(table).to(device) for table in (limits, places)))
