"""IdleViT: the best units are active, idle ones pass through unchanged (arXiv 2310.05654).

Shape letters: B images, N tokens of the map (H * W), K chosen tokens, C channels.
"""

from typing import Any

from torch import Tensor

from ..ops import Selection, select_units, take_tokens, unit_scores
from ..registry import POLICIES
from .policy import EVERYTHING, Plan, Policy, positive
from .scorers import ScorableBlock

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
        self.idle_context = context == 'all'
        self.summarises = context == 'summary'

    def plan(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        keep_ratio: float,
        block: ScorableBlock,
        memory: Any = None,
    ) -> tuple[Plan, None]:
        learns = self.scorer.learns and self.training
        if keep_ratio == 1.0 and not learns:
            return EVERYTHING, None
        scores, keys = self.score(x, hw_shape, block)
        if keep_ratio == 1.0:
            return Plan(gate=straight_through(scores)), None
        layout = block.unit_layout(hw_shape, x.device)
        ranked = unit_scores(scores.detach(), layout)
        selection = select_units(ranked, layout, keep_ratio, self.rounding)
        gate = straight_through(_scores_of(scores, selection)) if learns else None
        complete = block.with_prefix(selection)
        ids = selection.token_ids
        if self.summarises and block.uses_summaries and ids.shape[1] < scores.shape[1]:
            # Keys are computed anew, with those of the summaries.
            weights = positive(scores.detach()).scatter(1, ids, 0.0)
            return Plan(complete, gate, weights), None
        if keys is not None and not self.idle_context:
            keys = take_tokens(keys, complete)
        return Plan(complete, gate, keys=keys), None


def straight_through(scores: Tensor) -> Tensor:
    """Zeros whose gradient is that of the scores."""
    return scores - scores.detach()


def _scores_of(scores: Tensor, selection: Selection) -> Tensor:
    """Scores of the selected tokens: (B, K); of padding slots any."""
    return scores.gather(1, selection.token_ids.clamp(max=scores.shape[1] - 1))
