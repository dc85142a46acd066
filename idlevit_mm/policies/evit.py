"""EViT: tokens that get little attention leave, fused into one (arXiv 2202.07800).

Shape letters: B images, N tokens of the map (H * W), T rows in play.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import Rows, Units
from ..registry import POLICIES
from .plan import Plan, Regroup
from .policy import Policy, positive
from .select import best_places, num_active, unit_scores


@POLICIES.register_module()
class EViT(Policy):
    """Tokens leave a stage for good, and keep their last features in their places of the map.

    The keep ratio of a block is the share of the tokens *still in play* that stay, as in the paper;
    1.0 means that none leaves here, and the blocks after go on with those in play. In a pyramid all
    tokens are in play again at the next stage.

    With the scorer ``class_attention``, the default where there is a class token, tokens leave
    between attention and MLP, and the fused token, sum of a_i x_i over those that leave (a the
    class attention, not renormalised), joins the sequence and competes later: the published
    algorithm. With other scorers tokens leave before the block; the fused token is the mean of all
    that have left, weighted by the scores they left with, is formed anew in each block (in Swin one
    for each window), and is dropped after it. In spatial-reduction attention it is a query only,
    and stands in their places in PVTv2's convolution; PVT has no use for it.

    Args:
        fuse: Whether there is a fused token.
        rounding: How the number of kept tokens is rounded; ``ceil`` as published.
        **kwargs: Further arguments of ``Policy``.
    """

    CLASS_TOKEN_SCORER = 'class_attention'
    RANKS_BY_ATTENTION = True

    def __init__(
        self, embed_dims: int, fuse: bool = True, rounding: str = 'ceil', **kwargs: Any
    ) -> None:
        super().__init__(embed_dims, rounding=rounding, **kwargs)
        self.fuse = fuse

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, int | None]:
        if state is None and units.inside is not None:
            # How many tokens are in play, if not all rows are: padding of images is not.
            state = units.valid[0]
        if scores is None:
            ask = keep_ratio < 1.0 and self.scorer.NEEDS == 'class_attention'
            return last.but(ask=ask), state
        if last.rows is None:
            ids = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        else:
            ids = last.rows.ids
        count = num_active(keep_ratio, state or ids.shape[1], self.rounding)
        state = state and count
        ranked = unit_scores(scores, units).squeeze(1)
        ids = ids.gather(1, best_places(ranked.gather(1, ids), count))
        if not self.fuse or ids.shape[1] == scores.shape[1]:
            return Plan(Rows(ids), hold=True), state
        weights = positive(scores, units.inside)
        if last.summary is not None:
            # Who left earlier keeps the weight it left with.
            weights = torch.where(last.summary > 0, last.summary, weights)
        # Not held: the summary is formed anew in each block.
        return Plan(Rows(ids), summary=weights.scatter(1, ids, 0.0)), state

    def between(
        self, attention: Tensor, plan: Plan, keep_ratio: float, state: Any
    ) -> tuple[Regroup, int | None]:
        count = num_active(keep_ratio, state or attention.shape[1], self.rounding)
        keep = best_places(attention, count)
        fuse = None
        if self.fuse and count < attention.shape[1]:
            fuse = attention.scatter(1, keep, 0.0)
        return Regroup(keep, fuse), state and count + (fuse is not None)
