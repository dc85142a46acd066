"""Which units are active: so many of the best.

Shape letters: B images, N tokens of the map, G groups, U units of a group, S tokens of a unit, K
units that are kept.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import backend_at
from ..ops import Rows, Units

ROUNDINGS: dict[str, Callable[[float], int]] = {
    'nearest': round,
    'floor': math.floor,
    'ceil': math.ceil,
}


def num_active(keep_ratio: float, num_units: int, rounding: str = 'nearest') -> int:
    """Number of active units: max(1, rounded keep_ratio * num_units)."""
    # A size that torch.jit traces is a tensor, which cannot be rounded.
    return max(1, ROUNDINGS[rounding](keep_ratio * int(num_units)))


def unit_scores(scores: Tensor, units: Units, reduction: str = 'mean') -> Tensor:
    """Score of a unit: the ``mean`` of its tokens' (B, N), or their ``l2`` norm: (B, G, U).

    Padding, of windows and of images, counts for neither. Units that are all padding of images have
    the least number, and those that are no tokens minus infinity.
    """
    # Below any score, but above slots that are no token, which can never be taken.
    lowest = torch.finfo(scores.dtype).min
    if units.inside is not None:
        scores = scores.masked_fill(~units.inside, lowest)
    if units.in_order:
        return scores[:, None, :]
    slots = F.pad(scores, (0, 1), value=float('-inf'))[:, units.token_ids]
    if units.token_ids.shape[2] == 1:
        return slots.squeeze(-1)
    valid = held = units.token_ids >= 0
    if units.inside is not None:
        valid = F.pad(units.inside, (0, 1))[:, units.token_ids]
    slots = torch.where(valid, slots, 0.0)
    count = valid.sum(-1)
    if reduction == 'l2':
        total = torch.linalg.vector_norm(slots, dim=-1)
    else:
        total = slots.sum(-1) / count.clamp(min=1)
    total = total.masked_fill(count == 0, lowest)
    return total.masked_fill(~held.any(-1), float('-inf'))


def select_units(
    scores: Tensor, units: Units, keep_ratio: float, rounding: str = 'nearest'
) -> Rows:
    """The tokens of the best ``num_active`` units of every group, ascending within a group.

    ``scores`` (B, G, U) are those of ``unit_scores``; the ratio is that of the units that hold a
    token.
    """
    counts = tuple(num_active(keep_ratio, valid, rounding) for valid in units.valid)
    chosen = backend_at(scores).best(scores, counts)
    if units.in_order:
        return Rows(chosen)
    ids = units.token_ids.flatten(0, 1)[chosen].flatten(1)
    whole = units.token_ids.shape[2] > 1
    return Rows(ids, chosen if whole else None, units.padded)


def best_places(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` highest of (B, N) scores in each row, ascending: (B, count)."""
    return backend_at(scores).best(scores[:, None], (count,))
