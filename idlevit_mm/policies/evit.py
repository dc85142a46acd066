"""EViT: tokens that get little attention leave, fused into one (arXiv 2202.07800).

Shape letters: B images, N tokens of the map (H * W), T tokens in play, P tokens before the map
(class token), K kept tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import behind_prefix, best_places, num_active, put_tokens, take_tokens
from ..registry import POLICIES
from .policy import EVERYTHING, Plan, Policy, chosen, positive
from .scorers import ScorableBlock


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
    tokens that have left, weighted by the scores they left with, is formed anew in each block from
    their last features (in Swin one for each window), serves as query and key of the block and is
    then dropped, because windows and maps have no place for it. In spatial-reduction attention
    the keys are the whole map, with all that have left: there it is a query only, and stands in
    their places in PVTv2's convolution; PVT has no use for it.

    Args:
        fuse: Whether there is a fused token.
        rounding: How the number of kept tokens is rounded; ``ceil`` as published.
        **kwargs: Further arguments of ``Policy``.
    """

    CLASS_TOKEN_SCORER = 'class_attention'
    REORGANISES = True

    def __init__(
        self, embed_dims: int, fuse: bool = True, rounding: str = 'ceil', **kwargs: Any
    ) -> None:
        super().__init__(embed_dims, rounding=rounding, **kwargs)
        self.fuse = fuse

    def plan(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        keep_ratio: float,
        block: ScorableBlock,
        memory: Plan | None = None,
    ) -> tuple[Plan, Plan | None]:
        if keep_ratio < 1.0 and not self.scorer.ranks_after_attention:
            memory = self._leave(x, hw_shape, keep_ratio, block, memory)
        return EVERYTHING if memory is None else memory, memory

    def uses_attention(self, keep_ratio: float) -> bool:
        return keep_ratio < 1.0 and super().uses_attention(keep_ratio)

    def reorganise(
        self,
        x: Tensor,
        active: Tensor,
        attention: Tensor,
        plan: Plan,
        keep_ratio: float,
        num_prefix: int,
        memory: Plan | None,
    ) -> tuple[Tensor, Tensor, Plan, Plan | None]:
        rest = attention[:, num_prefix:]
        count = num_active(keep_ratio, rest.shape[1], self.rounding)
        places = best_places(rest, count)
        kept = behind_prefix(places, num_prefix)
        ids, staying = kept, take_tokens(active, chosen(kept))
        if plan.selection is None:
            x = active
        else:
            # Those that leave now keep what attention has made of them.
            x = put_tokens(x, plan.selection, active)
            ids = plan.selection.token_ids.gather(1, kept)
        if self.fuse and count < rest.shape[1]:
            share = rest.scatter(1, places, 0.0).to(active.dtype)
            fused = share[:, None] @ active[:, num_prefix:]
            # The fused token gets a place behind the map.
            ids = torch.cat([ids, torch.full_like(ids[:, :1], x.shape[1])], dim=1)
            x, staying = torch.cat([x, fused], dim=1), torch.cat([staying, fused], dim=1)
        plan = Plan(chosen(ids))
        return x, staying, plan, plan

    def _leave(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        keep_ratio: float,
        block: ScorableBlock,
        memory: Plan | None,
    ) -> Plan:
        scores = self.scores(x, hw_shape, block)
        left = None
        if memory is None or memory.selection is None:
            ids = torch.arange(scores.shape[1], device=x.device).expand_as(scores)
        else:
            ids, left = memory.selection.unit_ids, memory.idle_weights
        count = num_active(keep_ratio, ids.shape[1], self.rounding)
        ids = ids.gather(1, best_places(scores.gather(1, ids), count))
        if not self.fuse or not block.uses_summaries or ids.shape[1] == scores.shape[1]:
            # Nothing has left, or what has left is among the keys anyhow.
            return Plan(block.with_prefix(chosen(ids)))
        weights = positive(scores)
        if left is not None:
            # Who left earlier keeps the weight it left with.
            weights = torch.where(left > 0, left, weights)
        return Plan(block.with_prefix(chosen(ids)), idle_weights=weights.scatter(1, ids, 0.0))
