"""SparseViT: the windows with the strongest activations are active (arXiv 2303.17605)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops import Units
from ..registry import POLICIES
from .plan import EVERYTHING, Plan
from .policy import Policy
from .select import select_units, unit_scores


@POLICIES.register_module()
class SparseViT(Policy):
    """Whole windows are active or idle, ranked once per stage.

    The score of a window is the L2 norm over its tokens of their scores, by default the mean
    absolute activation. Tokens are scored at the first idle block of a stage, once for the plain
    and the shifted windows of all its blocks; the keep ratio must not rise within a stage.
    Arguments are those of ``Policy``; the default scorer is ``activation_norm``.
    """

    SCOPES = ('windows',)
    SCORER = 'activation_norm'

    def check_keep_ratios(self, keep_ratios: Sequence[Sequence[float]]) -> None:
        for stage, ratios in enumerate(keep_ratios):
            if any(later > earlier for earlier, later in zip(ratios, ratios[1:], strict=False)):
                raise ValueError(
                    f'keep_ratios={list(ratios)} of stage {stage} rise, which policy SparseViT '
                    'does not allow: within a stage each must be at most the one before'
                )

    def wants_scores(self, keep_ratio: float, state: Tensor | None) -> bool:
        return keep_ratio < 1.0 and state is None

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Tensor | None]:
        state = scores if state is None else state
        if keep_ratio == 1.0 or state is None:
            return EVERYTHING, state
        ranked = unit_scores(state, units, 'l2')
        return Plan(select_units(ranked, units, keep_ratio, self.rounding)), state
