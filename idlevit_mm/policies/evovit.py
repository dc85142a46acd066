"""Evo-ViT: informative tokens evolve slowly, the others fast (arXiv 2108.01390).

Shape letters: B images, N tokens of the map (H * W), T rows in play, K informative tokens.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import Rows, Units
from ..registry import POLICIES
from .plan import Plan
from .policy import Policy, positive
from .select import best_places, num_active

LEARNED = 'learned'
ONCE_PER_STAGE = 'stage'


class Handed(NamedTuple):
    """The running attention (B, N) of the stage before on this one's map, and its old sum (B, 1).

    The first attention of the stage is mixed in before it ranks.
    """

    running: Tensor
    total: Tensor


class AssistedHeads(nn.Module):
    """Classifiers of the mean token and of the class token (B, C): (B, classes) each.

    For the assisted loss; inference has no use for them.
    """

    def __init__(self, embed_dims: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self.of_mean = nn.Linear(embed_dims, classes)
        self.of_class = nn.Linear(embed_dims, classes)

    def forward(self, mean: Tensor, class_token: Tensor) -> tuple[Tensor, Tensor]:
        """Logits; the mean comes normalised, by the norm of the network's outputs."""
        return self.of_mean(mean), self.of_class(self.norm(class_token))


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
        alpha: Weight of the new attention: a number, one for each block of the network, or
            ``learned``, a weight of each block that begins at 1/2.
        representative: Whether there is a representative token; without it placeholders pass
            through unchanged, as in the official code of the DeiT models.
        rank_at: Blocks that rank, counted over the whole network from 0: the first of each stage of
            the method. The blocks after them compute the same tokens, which stay packed, and
            placeholders receive the sum of what was added to the representative at the end (in
            Swin, where representatives are those of a block's windows, after each block).
            ``stage`` for the first idle block of each stage of the network; None for all blocks.
        across_stages: Whether g goes on to the next stage of the network: of each cell of the
            subsampled map it has the first token's; the next attention is mixed in, for all tokens,
            and the sum is brought back to the old one.
        assist: Number of classes that ``AssistedLoss`` trains the last block's tokens with; None
            for no such loss.
        **kwargs: Further arguments of ``Policy``.

    Raises:
        ValueError: ``alpha`` lies outside [0, 1], is learned without a representative, through
            which alone it gets a gradient, or has not one value for each block; ``rank_at`` names
            no block; ``assist`` without class token.

    Attributes:
        stage_wise: Whether it follows ``rank_at``; every block ranks where not.
    """

    CLASS_TOKEN_SCORER = 'class_attention'
    RANKS_BY_ATTENTION = True

    def __init__(
        self,
        embed_dims: int,
        alpha: float | Sequence[float] | str = 0.5,
        representative: bool = True,
        rank_at: Sequence[int] | str | None = None,
        across_stages: bool = False,
        assist: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dims, **kwargs)
        self.representative = representative
        self.across_stages = across_stages
        self.rank_at, self.stage_wise = _checked_ranks(rank_at), rank_at is not None
        self.mixing: nn.Parameter | None = None
        self.alphas: float | list[float] = 0.5
        if alpha != LEARNED:
            self.alphas = _checked_alphas(alpha)
        elif representative:
            self.mixing = nn.Parameter(torch.zeros(1))
        else:
            raise ValueError("policy.alpha='learned' needs representative=True, which trains it")
        whole = type(assist) is int and assist > 0
        if assist is not None and not (kwargs.get('class_token') and whole):
            raise ValueError(
                f'policy.assist={assist!r} must be None or, with a class token, a number of classes'
            )
        self.assist, self.embed_dims = assist, embed_dims
        self.heads: AssistedHeads | None = None

    def put(self, place: int, depths: Sequence[int]) -> None:
        super().put(place, depths)
        blocks = sum(depths)
        if isinstance(self.alphas, list) and len(self.alphas) != blocks:
            raise ValueError(f'policy.alpha={self.alphas} must have one value for {blocks} blocks')
        if isinstance(self.rank_at, list) and not all(0 <= one < blocks for one in self.rank_at):
            raise ValueError(f'policy.rank_at={self.rank_at} must lie in 0 to {blocks - 1}')
        if self.assist is not None and place == blocks - 1:
            self.heads = AssistedHeads(self.embed_dims, self.assist)

    def check_keep_ratios(self, keep_ratios: Sequence[Sequence[float]]) -> None:
        if self._asks and keep_ratios[0][0] < 1.0:
            raise ValueError(
                f'keep_ratios={list(keep_ratios[0])} begin with {keep_ratios[0][0]}, but policy '
                'EvoViT knows no class attention before the first block: it must be 1.0 there'
            )
        if self.rank_at is None:
            return
        places = count()
        for stage, ratios in enumerate(keep_ratios):
            before = 1.0
            for ratio in ratios:
                place = next(places)
                begins = before == 1.0 if self.rank_at == ONCE_PER_STAGE else place in self.rank_at
                if ratio != before and not begins:
                    raise ValueError(
                        f'keep_ratios={list(ratios)} of stage {stage} change at block {place}, '
                        f'which policy.rank_at={self.rank_at!r} of EvoViT does not allow: the '
                        'blocks after one that ranks must have its ratio'
                    )
                before = ratio

    @property
    def halves_differ(self) -> bool:
        return not self._asks and not self.stage_wise

    @property
    def alpha(self) -> float | Tensor:
        """Weight of the new attention in this block."""
        if self.mixing is not None:
            return self.mixing.sigmoid()
        return self.alphas[self.place] if isinstance(self.alphas, list) else self.alphas

    @property
    def _asks(self) -> bool:
        return self.scorer.NEEDS == 'class_attention'

    @property
    def _ranks(self) -> bool:
        """Whether the block ranks wherever it stands."""
        if not self.stage_wise:
            return True
        return isinstance(self.rank_at, list) and self.place in self.rank_at

    def entering(
        self, state: Any, before: tuple[int, int], hw_shape: tuple[int, int]
    ) -> Handed | None:
        if not self.across_stages or state is None:
            return None
        running, total = state if isinstance(state, Handed) else (state, state.sum(1, keepdim=True))
        cells = running.unflatten(1, before)
        for dim, (old, new) in enumerate(zip(before, hw_shape, strict=True), 1):
            # Maps of odd sides are rounded up or down, as the family pads.
            firsts = torch.arange(new, device=running.device) * round(old / new)
            cells = cells.index_select(dim, firsts.clamp(max=old - 1))
        return Handed(cells.flatten(1), total)

    def wants_scores(self, keep_ratio: float, state: Any) -> bool:
        wanted = super().wants_scores(keep_ratio, state)
        return wanted and (self._ranks or not isinstance(state, Tensor))

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Any]:
        attention = None
        if scores is not None:
            scores = positive(scores, units.inside)
            attention = scores / scores.sum(dim=1, keepdim=True)
        is_first = not isinstance(state, Tensor)
        running = state if attention is None or not is_first else self._first(attention, state)
        # check_keep_ratios sees to it that the running attention is known where it is needed.
        if keep_ratio == 1.0 or not isinstance(running, Tensor):
            return Plan(ask=self._asks, gate=self._anchor(units.num_tokens)), state
        if last.rows is not None and not self._ranks:
            return last.but(gate=self._anchor(last.rows.ids.shape[1])), running
        kept = num_active(keep_ratio, units.valid[0], self.rounding)
        places = best_places(running, kept)
        # A summary of no token would be one more key.
        follows = self.representative and kept < running.shape[1]
        summary = running.scatter(1, places, 0.0) if follows else None
        if attention is not None and not is_first:
            running = self._moved(running, places, attention.gather(1, places))
        plan = Plan(Rows(places), 'rows', summary, follows, self._anchor(kept), self._asks)
        return plan.but(hold=True) if self.stage_wise else plan, running

    def between(
        self, attention: Tensor, plan: Plan, keep_ratio: float, state: Any
    ) -> tuple[None, Tensor]:
        if not isinstance(state, Tensor):
            return None, self._first(attention, state)
        if plan.rows is None:
            return None, (1 - self.alpha) * state + self.alpha * attention
        return None, self._moved(state, plan.rows.ids, attention)

    def _first(self, attention: Tensor, state: Handed | None) -> Tensor:
        """The running attention (B, N) after the first one of a stage."""
        if state is None:
            return attention
        running = (1 - self.alpha) * state.running + self.alpha * attention
        return running * (state.total / running.sum(dim=1, keepdim=True))

    def _moved(self, running: Tensor, places: Tensor, attention: Tensor) -> Tensor:
        """The running attention (B, N) after the new one (B, K) of the informative tokens."""
        moved = (1 - self.alpha) * running.gather(1, places) + self.alpha * attention
        return torch.scatter(running, 1, places, moved)

    def _anchor(self, rows: int) -> Tensor | None:
        """Zeros (1, T) that give the learned alpha a gradient of 0 where it has no use.

        Distributed training refuses weights without a gradient.
        """
        if self.mixing is None or not self.training:
            return None
        return (0.0 * self.mixing).expand(1, rows)


def _checked_alphas(alpha: Any) -> float | list[float]:
    values = list(alpha) if isinstance(alpha, (list, tuple)) else [alpha]
    if not all(isinstance(value, (int, float)) and 0.0 <= value <= 1.0 for value in values):
        raise ValueError(
            f'policy.alpha={alpha!r} must lie in [0, 1]; allowed: a number, one for each block, or '
            "'learned'"
        )
    return values if isinstance(alpha, (list, tuple)) else alpha


def _checked_ranks(rank_at: Any) -> list[int] | str | None:
    if rank_at in (None, ONCE_PER_STAGE):
        return rank_at
    if not (isinstance(rank_at, (list, tuple)) and all(type(one) is int for one in rank_at)):
        raise ValueError(
            f"policy.rank_at={rank_at!r} is unknown; allowed: None, 'stage', or numbers of blocks"
        )
    return list(rank_at)
