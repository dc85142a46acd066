"""Small functions of tokens and rows that blocks are made of.

Shape letters: B images, N tokens of the map, T computed rows, R summaries of idle tokens, S rows, C
channels.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import Extent, Rows


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


def counted(attention: Tensor | None, rows: Rows | None, extent: Extent | None) -> Any:
    """Attention to some rows (B, T), all of x where ``rows`` is None; 0 to padding of images."""
    if extent is None or attention is None:
        return attention
    inside = extent.inside
    if rows is not None:
        # What a policy has appended stands for tokens of the image.
        more = inside.new_ones(len(inside), 1)
        inside = torch.cat([inside, more], 1).gather(1, rows.ids.clamp(max=inside.shape[1]))
    return attention.masked_fill(~inside, 0.0)


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
