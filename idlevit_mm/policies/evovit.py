"""Evo-ViT: informative tokens evolve slowly, the others fast (arXiv 2108.01390).

Shape letters: B images, N tokens of the map (H * W), T active tokens, P tokens before the map
(class token), K informative tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import best_places, num_active
from ..registry import POLICIES
from .policy import EVERYTHING, Plan, Policy, chosen, positive
from .scorers import ScorableBlock


@POLICIES.register_module()
class EvoViT(Policy):
    """The best tokens by a running attention are informative; the rest follow a representative.

    The running attention g starts as the first attention a and then moves by g <- (1 - alpha) g +
    alpha a, where only informative tokens are updated. The representative of the other tokens
    (*placeholders*) is their mean weighted by g; it goes through attention and MLP with the
    informative ones (slow), and every placeholder then receives what both have added to it (fast).

    With the scorer ``class_attention``, the default where there is a class token, a is the class
    attention of each block, mean over heads: the published algorithm. With other scorers a is the
    score of the tokens that enter the block, divided by their sum; g starts anew in each stage and
    stays as it is in dense blocks, which do not score.
    In Swin every window has a representative of its own placeholders, a slot more without position
    bias; in spatial-reduction attention there is one for the map, which is a query only, because
    the placeholders are in the reduced map already.

    Args:
        alpha: Weight of the new attention.
        representative: Whether there is a representative token; without it placeholders pass
            through unchanged, as in the official code of the DeiT models.
        **kwargs: Further arguments of ``Policy``.

    Raises:
        ValueError: ``alpha`` lies outside [0, 1].
    """

    CLASS_TOKEN_SCORER = 'class_attention'
    REORGANISES = True

    def __init__(
        self, embed_dims: int, alpha: float = 0.5, representative: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(embed_dims, **kwargs)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f'policy.alpha={alpha} must lie in [0, 1]')
        self.alpha = alpha
        self.representative = representative

    def check_keep_ratios(self, keep_ratios: Sequence[Sequence[float]]) -> None:
        if self.scorer.ranks_after_attention and keep_ratios[0][0] < 1.0:
            raise ValueError(
                f'keep_ratios={list(keep_ratios[0])} begin with {keep_ratios[0][0]}, but policy '
                'EvoViT knows no class attention before the first block: it must be 1.0 there'
            )

    def plan(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        keep_ratio: float,
        block: ScorableBlock,
        memory: Tensor | None = None,
    ) -> tuple[Plan, Tensor | None]:
        if keep_ratio == 1.0:
            return EVERYTHING, memory
        attention = None
        if not self.scorer.ranks_after_attention:
            scores = positive(self.scores(x, hw_shape, block))
            attention = scores / scores.sum(dim=1, keepdim=True)
        running = attention if memory is None else memory
        assert running is not None  # check_keep_ratios has seen to it
        count = num_active(keep_ratio, running.shape[1], self.rounding)
        places = best_places(running, count)
        # A summary of no token would be one more key.
        follows = self.representative and count < running.shape[1]
        weights = running.scatter(1, places, 0.0) if follows else None
        if attention is not None:
            running = self._moved(running, places, attention.gather(1, places))
        selection = block.with_prefix(chosen(places))
        return Plan(selection, idle_weights=weights, spreads=follows), running

    def reorganise(
        self,
        x: Tensor,
        active: Tensor,
        attention: Tensor,
        plan: Plan,
        keep_ratio: float,
        num_prefix: int,
        memory: Tensor | None,
    ) -> tuple[Tensor, Tensor, Plan, Tensor]:
        attention = attention[:, num_prefix:]
        if memory is None:
            memory = attention
        elif plan.selection is None:
            memory = (1 - self.alpha) * memory + self.alpha * attention
        else:
            places = plan.selection.unit_ids
            memory = self._moved(memory, places, attention[:, : places.shape[1]])
        return x, active, plan, memory

    def _moved(self, running: Tensor, places: Tensor, attention: Tensor) -> Tensor:
        """The running attention (B, N) after the new one (B, K) of the informative tokens."""
        moved = (1 - self.alpha) * running.gather(1, places) + self.alpha * attention
        return torch.scatter(running, 1, places, moved)
