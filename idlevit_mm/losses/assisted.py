"""Evo-ViT's assisted loss: the class token learns what its attention is to find.

Shape letters: B images, N tokens of the map, C channels, K classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError
from ..registry import AUXILIARY_LOSSES
from .base import AuxiliaryLoss
from .capture import Step, last_norm
from .teacher import Teachers


@AUXILIARY_LOSSES.register_module()
class AssistedLoss(AuxiliaryLoss):
    """Classification of images, half by the mean of their tokens and half by the class token.

    As in Evo-ViT (arXiv 2108.01390), whose class token nothing else would train where outputs are
    maps. Several classes may be in an image, so it is the cross entropy of each class by itself,
    averaged over classes and images. The classifiers are weights of the backbone's policy:
    ``policy=dict(type='EvoViT', assist=80)``.

    Arguments, and errors, are those of ``AuxiliaryLoss``.
    """

    def __init__(self, loss_weight: float = 1.0, name: str = 'loss_assisted') -> None:
        super().__init__(loss_weight, name)
        self.norms: dict[str, str] = {}

    def prepare(self, model: nn.Module, backbones: Mapping[str, Any], teachers: Teachers) -> None:
        for name, backbone in backbones.items():
            self.norms[name] = last_norm(backbone, name, 'AssistedLoss')
            if _heads(backbone) is None:
                raise SettingError(
                    f'AssistedLoss needs classifiers, which {name} has not; set policy=dict('
                    "type='EvoViT', assist=<number of classes>)"
                )

    def modules(self) -> Iterable[str]:
        return self.norms.values()

    def __call__(self, step: Step) -> Tensor:
        losses = []
        for name, backbone in step.backbones.items():
            (x,) = step.calls[self.norms[name]].args
            first = -backbone.num_class
            logits = _heads(backbone)(backbone.ln1(x[:, :first].mean(dim=1)), x[:, first])
            goal = classes_of(step.samples, logits[0])
            losses += [F.binary_cross_entropy_with_logits(one, goal) for one in logits]
        return self.loss_weight * torch.stack(losses).mean()


def classes_of(samples: Sequence[Any], like: Tensor) -> Tensor:
    """Shares of classes in each image, from samples of OpenMMLab's libraries: ``like`` (B, K)."""
    goal = torch.zeros_like(like)
    for row, sample in zip(goal, samples, strict=True):
        if 'gt_score' in sample:  # of a mixed image
            row.copy_(sample.gt_score)
            continue
        if 'gt_label' in sample:
            row[sample.gt_label] = 1.0
            continue
        is_detected = 'gt_instances' in sample
        labels = sample.gt_instances.labels if is_detected else sample.gt_sem_seg.data
        # Of pixels that count for nothing the label is above all classes.
        row[labels[labels < like.shape[1]]] = 1.0
    return goal


def _heads(backbone: Any) -> Any:
    return getattr(backbone.idle_blocks[-1][-1].policy, 'heads', None)
