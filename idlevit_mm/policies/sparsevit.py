"""SparseViT: the windows with the strongest activations are active (arXiv 2303.17605)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops import Units
from ..registry import POLICIES
from .plan import Plan
from .policy import Policy
from .select import select_units, unit_scores

PADDINGS = ('after_norm', 'before_norm')


@POLICIES.register_module()
class SparseViT(Policy):
    """Whole windows are active or idle, ranked once per stage.

    The score of a window is the L2 norm over its tokens of their scores, by default the mean
    absolute activation. Tokens are scored at the first idle block of a stage, once for the plain
    and the shifted windows of all its blocks; the keep ratio must not rise within a stage.
    The default scorer is ``activation_norm``.

    Args:
        padding: Where the map is padded to whole windows: ``after_norm``, as in mmdet's dense
            block, or ``before_norm``, as in the release: padding, which active windows see as
            keys, then is the bias of the norm. Blocks with ratio 1.0 do the same.
        **kwargs: Further arguments of ``Policy``.

    Raises:
        ValueError: ``padding`` is unknown.
    """

    SCOPES = ('windows',)
    SCORER = 'activation_norm'

    def __init__(self, embed_dims: int, padding: str = 'after_norm', **kwargs: Any) -> None:
        super().__init__(embed_dims, **kwargs)
        if padding not in PADDINGS:
            raise ValueError(
                f'policy.padding={padding!r} is unknown; allowed: {", ".join(PADDINGS)}'
            )
        self.pads_first = padding == 'before_norm'

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
            return Plan(pads_first=self.pads_first), state
        ranked = unit_scores(state, units, 'l2')
        rows = select_units(ranked, units, keep_ratio, self.rounding)
        return Plan(rows, pads_first=self.pads_first), state
