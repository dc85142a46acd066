"""Small functions of tokens and rows that blocks are made of.

Shape letters: B images, N tokens of the map, T computed rows, R summaries of idle tokens, S rows, C
channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import backend_at, is_plain, kind_of
from ..ops import Extent, Rows, WindowLayout
from ..policies import Plan
from .tokens import Tokens


def weighted_mean(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens of (B, R, S, C) by weights (B, R, S): (B, R, C); zero without weight."""
    total = weights.sum(dim=-1, keepdim=True)
    share = torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return (share.to(tokens.dtype)[..., None, :] @ tokens).squeeze(-2)


def group_means(x: Tensor, weights: Tensor, layout: WindowLayout | None) -> Tensor:
    """Mean over the tokens of each window of x (B, S, C), or of all, by weights (B, N)."""
    if layout is None:
        return weighted_mean(x[:, None, : weights.shape[1]], weights[:, None])
    slots = layout.token_ids.flatten().expand(x.shape[0], -1)
    tokens = backend_at(x).take(x, Rows(slots, padded=layout.has_padding))
    tokens = tokens.unflatten(1, layout.token_ids.shape)
    # Padding has weight 0, whatever was read there.
    return weighted_mean(tokens, F.pad(weights, (0, 1))[:, layout.token_ids])


def to_groups(summaries: Tensor, layout: WindowLayout | None, num_class: int) -> Tensor:
    """Give the tokens of each window its summary (B, R, C): (B, N + P, C), or as it is for all."""
    if layout is None:
        return summaries
    # Class tokens are computed, whatever they are given.
    return summaries[:, F.pad(layout.window_ids, (0, num_class))]


def without_cells(now: Tensor, plan: Plan, side: int | None, num_class: int = 0) -> Tensor | None:
    """Of rows (B, T + P + R, C) those that are keys where cells have summaries; None if all are."""
    if plan.rows is None or plan.summary is None or not side:
        return None
    return now[:, : plan.rows.ids.shape[1] + num_class]


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


def is_alone(block: nn.Module, scorer: nn.Module) -> bool:
    """Whether nobody but the walk can hold what goes in or comes out, or goes to a layer."""
    seen = (block, *block.children(), *scorer.modules())
    return kind_of(scorer) != '' and all(is_plain(part, type(part)) for part in seen)


def numbers(hw_shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width as plain numbers."""
    # torch.compile traces a second image size with symbolic sides; index tables need numbers.
    return len(range(hw_shape[0])), len(range(hw_shape[1]))


def anchored(x: Tensor, *unused: nn.Module) -> Tensor:
    """X, with a gradient of 0 for layers that it did not go through.

    Distributed training refuses weights without a gradient.
    """
    for part in unused:
        for parameter in part.parameters():
            x = x + 0.0 * parameter.sum().to(x.dtype)
    return x


def fitted(block: Any, plan: Plan, scores: Tensor | None) -> Plan:
    """A plan as a block can follow it, with a gate where its scorer learns."""
    if plan.summary is not None:
        used = plan.summary if plan.spread or block.uses_summaries else None
        plan = plan.but(summary=used, hold=plan.hold and block.holds_summaries)
    if block.policy.scorer.learns and block.training:
        plan = plan.but(gate=straight_through(scores, plan.rows))
    return plan


def attended_by_few(block: Any, tokens: Tokens, plan: Plan, keys: Tensor | None) -> Tokens:
    """The attention half as the plan has it for this half alone; packed are the rows of the MLP."""
    if plan.attends == 'nothing':
        tokens = block.opened(tokens, plan)
        unused = (block.attn, getattr(block, block.NORMS[0])) if block.training else ()
        return tokens.become(anchored(tokens.now, *unused))
    tokens, _ = block.attention_half(tokens, plan.attends, keys)
    return block.opened(block.closed(tokens, plan.attends), plan)
