"""Small functions of tokens and rows that blocks are made of.

Shape letters: B images, N tokens of the map, T computed rows, R summaries of idle tokens, S rows, C
channels.
"""

import torch
from torch import Tensor

from ..ops import Rows


def weighted_mean(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens of (B, R, S, C) by weights (B, R, S): (B, R, C); zero without weight."""
    total = weights.sum(dim=-1, keepdim=True)
    share = torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return (share.to(tokens.dtype)[..., None, :] @ tokens).squeeze(-2)


def straight_through(scores: Tensor, rows: Rows | None) -> Tensor:
    """Zeros whose gradient is that of the scores (B, N) of some rows; of padding any."""
    zeros = scores - scores.detach()
    return zeros if rows is None else zeros.gather(1, rows.ids.clamp(min=0))


def gated(before: Tensor, after: Tensor, gate: Tensor) -> Tensor:
    """Rows after the block (B, T, C), and a gate whose value is 0 (B, K) for the first K of them.

    The gate gets the gradient of scaling what the block has added.
    """
    count = gate.shape[1]
    added = (after - before).detach()[:, :count]
    scaled = after[:, :count] + gate.to(after.dtype)[..., None] * added
    return torch.cat([scaled, after[:, count:]], dim=1) if count < after.shape[1] else scaled


def with_rows(ids: Tensor, first: int, count: int) -> Tensor:
    """Ids (B, K) and so many numbers from ``first`` on behind them."""
    if not count:
        return ids
    more = torch.arange(first, first + count, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([ids, more], dim=1)


def numbers(hw_shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width as plain numbers."""
    # torch.compile traces a second image size with symbolic sides; index tables need numbers.
    return len(range(hw_shape[0])), len(range(hw_shape[1]))
