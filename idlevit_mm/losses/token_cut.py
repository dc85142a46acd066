"""Token cut loss (IdleViT, arXiv 2310.05654): attention shall not cross from active to idle.

Shape letters: B images, N tokens of a block (those of the map, and a class token where there is
one).
"""

from collections.abc import Iterator, Mapping
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..kernels import exact
from ..ops import row_mask
from ..registry import AUXILIARY_LOSSES
from .base import AuxiliaryLoss
from .capture import Step
from .teacher import Teachers

KINDS = ('inter', 'intra', 'both')
WEIGHTINGS = ('mean', 'published')


@AUXILIARY_LOSSES.register_module()
class TokenCutLoss(AuxiliaryLoss):
    """Normalised cut between the active and the idle tokens of every idle block.

    With W_ij the softmax over keys j of the head mean of the scaled logits of all tokens, and m the
    keep mask (1 active, 0 idle), which gets no gradient::

        inter = mean_i (sum_j |m_i - m_j| W_ij) ** 2
        intra = mean_i (sum_j m_i m_j W_ij - m_i) ** 2

    The column of a class token is left out of ``inter``. Both follow from the share of attention
    that goes to active tokens, a_i = sum_j W_ij m_j, so W is never stored. The mean is over rows,
    images, and then idle blocks.

    Args:
        kind: ``inter``, ``intra`` or ``both`` for their sum; any other is a ValueError.
        weighting: ``mean`` over the idle blocks, or ``published``: the sum over every second one,
            from the first on, divided by the number of all. So do the losses of the release, which
            deletes from the list that it goes through.
        loss_weight: Factor of the loss; 20 in the paper.
        name: As in ``AuxiliaryLoss``, whose errors it shares.
    """

    needs_inputs = True

    def __init__(
        self,
        kind: str = 'both',
        loss_weight: float = 20.0,
        name: str = 'loss_token_cut',
        weighting: str = 'mean',
    ) -> None:
        super().__init__(loss_weight, name)
        for key, value, known in (('kind', kind, KINDS), ('weighting', weighting, WEIGHTINGS)):
            if value not in known:
                raise ValueError(f'{key}={value!r} is unknown; allowed: {", ".join(known)}')
        self.kind, self.every = kind, 2 if weighting == 'published' else 1

    def prepare(self, model: nn.Module, backbones: Mapping[str, Any], teachers: Teachers) -> None:
        for name, backbone in backbones.items():
            blocks = [*chain(*backbone.idle_blocks)]
            if any(block.policy.attention_ratio < 1.0 for block in blocks):
                raise SettingError(
                    f'{name} has policy.attention_ratios, so that not all active tokens attend; '
                    'TokenCutLoss is about their attention: leave these out, or drop the loss'
                )
            if any(block.policy.scope == 'windows' for block in blocks):
                raise SettingError(
                    f"{name} has policy.scope='windows': whole windows idle, so no attention "
                    'crosses from active to idle tokens and TokenCutLoss is 0 by definition; '
                    'use another scope or drop the loss'
                )

    def __call__(self, step: Step) -> Tensor:
        return self.of_backbones(step.backbones.values())

    def of_backbones(self, backbones: Any) -> Tensor:
        """Compute the weighted loss of the last pass of idle backbones; see ``kept_shares``.

        It is a scalar; 0 with graph where no block idled.
        """
        backbones = list(backbones)
        shares = chain.from_iterable(kept_shares(backbone, self.every) for backbone in backbones)
        cuts = [token_cut(share, mask, self.kind) for share, mask in shares]
        if not cuts:
            return 0.0 * next(backbones[0].parameters()).sum()
        plans = [plan for backbone in backbones for r in backbone.records for plan in r.plans]
        idled = sum(plan.rows is not None for plan in plans)
        return self.loss_weight * torch.stack(cuts).sum() / idled


def kept_shares(backbone: Any, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Share of attention to active tokens in each block that idled in the last forward pass.

    Or in every so many of them, from the first on.

    Yields:
        (B, N) share and (B, N) keep mask. A row of an idle token leaves the class token out.

    Raises:
        RuntimeError: The backbone ran without ``record_inputs``.
    """
    counted = count()
    for record, blocks in zip(backbone.records, backbone.idle_blocks, strict=True):
        idled = [plan.rows is not None for plan in record.plans]
        if any(idled) and not record.inputs:
            raise RuntimeError(
                'the inputs of the blocks are not on record: set backbone.record_inputs=True '
                'before the forward pass'
            )
        for index, block in enumerate(blocks):
            rows = record.plans[index].rows
            if rows is not None and next(counted) % every == 0:
                x = record.inputs[index]
                mask = row_mask(block.with_class(rows, record.hw_shape), x.shape[1]).float()
                yield _kept_share(block, x, record, mask), mask


def _kept_share(block: Any, x: Tensor, record: Any, mask: Tensor) -> Tensor:
    if not record.num_class:
        return block.recomputed(block.kept_share, x, record.hw_shape, mask)
    first = record.hw_shape[0] * record.hw_shape[1]
    map_alone = mask.clone()
    map_alone[:, first : first + record.num_class] = 0.0
    masks = torch.stack([mask, map_alone], dim=-1)
    share = block.recomputed(block.kept_share, x, record.hw_shape, masks)
    return torch.where(mask > 0, share[..., 0], share[..., 1])


def token_cut(share: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Token cut loss of one block, unweighted: a scalar of at least float32.

    The share (B, N) is sum_j W_ij m_j, in rows of idle tokens without the class token; the mask
    (B, N) is 1 for active tokens. ``kind`` is one of ``KINDS``.
    """
    share = exact(share)
    mask = mask.to(share.dtype)
    # Rows of an active token i: |1 - m_j| sums to 1 - a_i. Rows of an idle one: m_j sums to a_i.
    leaving = (mask * (1 - share)).square().mean()
    if kind == 'intra':
        return leaving
    entering = ((1 - mask) * share).square().mean()
    return leaving + entering if kind == 'inter' else 2 * leaving + entering
