"""Evo-ViT: informative tokens evolve slowly, the others fast (arXiv 2108.01390).

Shape letters: B images, N tokens of the map (H * W), T rows in play, K informative tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import Rows, Units
from ..registry import POLICIES
from .plan import Plan
from .policy import Policy, positive
from .select import best_places, num_active


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
    stays as it is in dense blocks, which do not score. In Swin every window has a representative of
    its own placeholders; in spatial-reduction attention there is one for the map, a query only.

    Args:
        alpha: Weight of the new attention.
        representative: Whether there is a representative token; without it placeholders pass
            through unchanged, as in the official code of the DeiT models.
        **kwargs: Further arguments of ``Policy``.

    Raises:
        ValueError: ``alpha`` lies outside [0, 1].
    """

    CLASS_TOKEN_SCORER = 'class_attention'
    RANKS_BY_ATTENTION = True

    def __init__(
        self, embed_dims: int, alpha: float = 0.5, representative: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(embed_dims, **kwargs)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f'policy.alpha={alpha} must lie in [0, 1]')
        self.alpha = alpha
        self.representative = representative

    def check_keep_ratios(self, keep_ratios: Sequence[Sequence[float]]) -> None:
        if self._asks and keep_ratios[0][0] < 1.0:
            raise ValueError(
                f'keep_ratios={list(keep_ratios[0])} begin with {keep_ratios[0][0]}, but policy '
                'EvoViT knows no class attention before the first block: it must be 1.0 there'
            )

    @property
    def _asks(self) -> bool:
        return self.scorer.NEEDS == 'class_attention'

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Tensor | None]:
        attention = None
        if scores is not None:
            scores = positive(scores, units.inside)
            attention = scores / scores.sum(dim=1, keepdim=True)
        running = attention if state is None else state
        if keep_ratio == 1.0 or running is None:  # check_keep_ratios sees to it that it is known
            return Plan(ask=self._asks), state
        count = num_active(keep_ratio, units.valid[0], self.rounding)
        places = best_places(running, count)
        # A summary of no token would be one more key.
        follows = self.representative and count < running.shape[1]
        summary = running.scatter(1, places, 0.0) if follows else None
        if attention is not None:
            running = self._moved(running, places, attention.gather(1, places))
        return Plan(Rows(places), summary=summary, spread=follows, ask=self._asks), running

    def between(
        self, attention: Tensor, plan: Plan, keep_ratio: float, state: Tensor | None
    ) -> tuple[None, Tensor]:
        if state is None:
            return None, attention
        if plan.rows is None:
            return None, (1 - self.alpha) * state + self.alpha * attention
        return None, self._moved(state, plan.rows.ids, attention)

    def _moved(self, running: Tensor, places: Tensor, attention: Tensor) -> Tensor:
        """The running attention (B, N) after the new one (B, K) of the informative tokens."""
        moved = (1 - self.alpha) * running.gather(1, places) + self.alpha * attention
        return torch.scatter(running, 1, places, moved)
