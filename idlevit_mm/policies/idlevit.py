"""IdleViT: the best units are active, idle ones pass through unchanged (arXiv 2310.05654)."""

from typing import Any

from torch import Tensor

from ..ops import Units
from ..registry import POLICIES
from .plan import EVERYTHING, Plan
from .policy import Policy, positive
from .select import select_units, unit_scores

CONTEXTS = ('active', 'summary', 'all')


@POLICIES.register_module()
class IdleViT(Policy):
    """Every block ranks all units anew; the best are active, the others pass through unchanged.

    Queries and keys are the active tokens and the class token (in spatial-reduction attention the
    keys are the reduced whole map). With the scorer ``class_query``, the default where there is a
    class token, this is the published algorithm.

    Args:
        context: What serves as keys and values: the ``active`` tokens, as published; a ``summary``
            of the idle ones besides, their mean weighted by scores (in Swin one for each window),
            as in Evo-ViT, but idle tokens receive nothing; or ``all`` tokens, for two more
            projections of the idle ones. In spatial-reduction attention keys are always the whole
            map; there a summary stands in the places of idle tokens in PVTv2's convolution.
        **kwargs: Further arguments of ``Policy``.

    Raises:
        ValueError: ``context`` is unknown, or a summary is asked for where whole windows idle.
    """

    SCOPES = ('map', 'window_tokens', 'windows')
    CLASS_TOKEN_SCORER = 'class_query'
    TRAINS_SCORER = True

    def __init__(self, embed_dims: int, context: str = 'active', **kwargs: Any) -> None:
        super().__init__(embed_dims, **kwargs)
        if context not in CONTEXTS:
            raise ValueError(
                f'policy.context={context!r} is unknown; allowed: {", ".join(CONTEXTS)}'
            )
        if context == 'summary' and self.scope == 'windows':
            raise ValueError(
                "policy.context='summary' is for single tokens, and with policy.scope='windows' "
                'whole windows idle; allowed there: active, all'
            )
        self.context = context

    @property
    def halves_differ(self) -> bool:
        return True

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, None]:
        if scores is None:
            return EVERYTHING, None
        rows = select_units(unit_scores(scores, units), units, keep_ratio, self.rounding)
        summary = None
        if self.context == 'summary' and rows.ids.shape[1] < scores.shape[1]:
            summary = positive(scores, units.inside).scatter(1, rows.ids, 0.0)
        return Plan(rows, 'all' if self.context == 'all' else 'rows', summary), None
