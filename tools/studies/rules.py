"""Rules that were tried and are in no release: policies and a scorer for studies alone.

Shape letters: B images, N tokens of the map, K active tokens.
"""

from typing import Any

import torch
from torch import Tensor

from idlevit_mm.ops import Units
from idlevit_mm.policies import IdleViT, Plan
from idlevit_mm.policies.scorers import MeanQuery, Seen
from idlevit_mm.registry import POLICIES, SCORERS


@POLICIES.register_module()
class AgedIdleViT(IdleViT):
    """Scores grow by a half with each block that a token has been idle in a row."""

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Any]:
        if scores is None:
            return super().plan(scores, units, keep_ratio, last, state)[0], state
        ages = torch.zeros_like(scores) if state is None else state
        plan, _ = super().plan(scores * (1 + 0.5 * ages), units, keep_ratio, last, None)
        assert plan.rows is not None
        return plan, (ages + 1).scatter(1, plan.rows.ids, 0.0)


@POLICIES.register_module()
class BlendedIdleViT(IdleViT):
    """Scores are the mean of those of this block and of the idle block before, each of mean 1."""

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Any]:
        if scores is None:
            return super().plan(scores, units, keep_ratio, last, state)[0], state
        own = scores / scores.mean(dim=1, keepdim=True)
        ranked = own if state is None else (own + state) / 2
        return super().plan(ranked, units, keep_ratio, last, None)[0], own


@SCORERS.register_module('query_logits')
class QueryLogits(MeanQuery):
    """As IdleViT ranks by its class token: heads are averaged before the softmax, not behind it."""

    def forward(self, seen: Seen) -> Tensor:
        # The logarithm is the logit but for a number of each head, which ranks nothing.
        assert seen.mean_query is not None
        return seen.mean_query.log().mean(dim=1)
