"""Mends what mmengine and mmseg get wrong, and a training would end or go astray with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mmengine.runner import activation_checkpointing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def mend_checkpointing() -> None:
    """Let ``activation_checkpointing`` of a config give all weights their gradients.

    mmengine leaves torch to its old way, which takes only tensors that are arguments by themselves
    for inputs: what idle blocks hand on beside the tokens would get no gradient, in silence, nor
    would a backbone, whose images need none.
    """
    activation_checkpointing.checkpoint = functools.partial(checkpoint, use_reentrant=False)


def mend_class_weights(model: nn.Module) -> None:
    """Let cross entropies with ``class_weight`` be averaged over masks with ignored pixels.

    mmseg looks up the weight of every label, those that are ignored too, which have none
    (``index 255 is out of bounds``).
    """
    for part in model.modules():
        criterion: Any = getattr(part, 'cls_criterion', None)
        # mmdet's of the same name takes its arguments in another order, and is right.
        own = getattr(criterion, '__module__', '').startswith('mmseg.')
        if own and criterion.__qualname__ == 'cross_entropy':
            part.cls_criterion = _over_labels(criterion)


def _over_labels(criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(criterion)
    def mended(
        pred: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        reduction: str = 'mean',
        avg_factor: Any = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor:
        if class_weight is not None and reduction == 'mean' and avg_factor is None:
            avg_factor = class_weight[label[label != ignore_index]].sum()
        return criterion(
            pred, label, weight, class_weight, reduction, avg_factor, ignore_index, **kwargs
        )

    mended.__qualname__ = 'mended'  # once is enough
    return mended
