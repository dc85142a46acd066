"""Distillation from a dense teacher: feature maps and class scores.

Shape letters: B images, C channels, H and W rows and columns of a map, K classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError
from ..kernels import exact
from ..registry import AUXILIARY_LOSSES
from .base import AuxiliaryLoss
from .capture import Call, Step, last_norm
from .teacher import Teacher, Teachers, check_description, find_modules

TOKENS = ('map', 'class', 'kept')


@AUXILIARY_LOSSES.register_module()
class FeatureDistillation(AuxiliaryLoss):
    """Distance between the directions of student and teacher features at every position.

    Each feature vector is divided by its L2 norm; the loss is the squared distance of the two unit
    vectors (2 - 2 cos, in [0, 4]), averaged over positions and images, then over stages. This is
    the mean square error over elements times C, so it does not vanish in wide networks: a weight of
    1000 on the plain mean over 384 channels, as in IdleViT, is a weight of 2.6 here.

    Args:
        teacher: ``dict(checkpoint='...')`` for the student's own network with every token active,
            or ``dict(config='...', checkpoint='...')`` for another one. None: the student's own
            network as training started from it (``load_from``). ``'student'``: the student itself
            as it is at the time, with every token active.
        stages: Places among the outputs of the backbone; None for all.
        tokens: What is compared: the ``map``, as said above; the ``class`` token after the last
            norm, as IdleViT does on DeiT; or the tokens ``kept`` by the student's last block, the
            class token included where there is one, as it does on LV-ViT: each channel divided by
            its norm over these tokens, the squared distance averaged over channels and images (the
            mean square error over elements times the number of all tokens). ``stages`` is for the
            map alone.

    Further arguments, and errors, are those of ``AuxiliaryLoss``.
    """

    def __init__(
        self,
        teacher: dict[str, Any] | str | None = None,
        loss_weight: float = 2.5,
        stages: Sequence[int] | None = None,
        name: str = 'loss_distill_feature',
        tokens: str = 'map',
    ) -> None:
        super().__init__(loss_weight, name)
        self.described = check_description(teacher)
        if tokens not in TOKENS:
            raise ValueError(f'tokens={tokens!r} is unknown; allowed: {", ".join(TOKENS)}')
        if tokens != 'map' and stages is not None:
            raise ValueError(f"stages={stages!r} is for tokens='map', not {tokens!r}")
        if stages is not None and (
            not isinstance(stages, (list, tuple))
            or not stages
            or any(not isinstance(stage, int) or stage < 0 for stage in stages)
        ):
            raise ValueError(f'stages={stages!r} must be None or places among the outputs from 0')
        self.stages, self.tokens = stages, tokens
        self.names: tuple[str, ...] = ()
        # The norm of each backbone that has the tokens.
        self.norms: dict[str, str] = {}

    def prepare(self, model: nn.Module, backbones: Mapping[str, Any], teachers: Teachers) -> None:
        self.teacher = teachers.get(self.described)
        self.names = tuple(backbones)
        for name, backbone in backbones.items():
            outputs = len(backbone.out_indices)
            if self.stages is not None and max(self.stages) >= outputs:
                raise SettingError(
                    f'stages={tuple(self.stages)} must lie in 0 to {outputs - 1}: {name} has '
                    f'{outputs} outputs'
                )
            has_class = backbone.idle_blocks[0][0].num_class > 0
            if self.tokens == 'class' or (self.tokens == 'kept' and has_class):
                user = f'FeatureDistillation with tokens={self.tokens!r}'
                self.norms[name] = last_norm(backbone, name, user)
        wanted = (*self.names, *self.norms.values())
        find_modules(self.teacher.model, wanted, 'FeatureDistillation', 'teacher')
        self.teacher.backbones.update(self.names)
        self.teacher.parts.update(self.norms.values())

    def modules(self) -> Iterable[str]:
        return (*self.names, *self.norms.values())

    def __call__(self, step: Step) -> Tensor:
        taught = self.teacher.calls(step)
        distances = []
        for name, backbone in step.backbones.items():
            own, other = (self._vectors(name, calls, backbone) for calls in (step.calls, taught))
            check_same_shapes(own, other, f'outputs of {name}')
            chosen = range(len(own)) if self.stages is None else self.stages
            distances += [direction_distance(own[index], other[index]) for index in chosen]
        return self.loss_weight * torch.stack(distances).mean()

    def _vectors(self, name: str, calls: Mapping[str, Call], student: Any) -> list[Tensor]:
        """What is compared of student or teacher; dimension 1 is that of the vectors."""
        maps = feature_maps(calls[name].output)
        if self.tokens == 'map':
            return maps
        tokens = maps[-1].flatten(2).transpose(1, 2)
        count = tokens.shape[1]
        if name in self.norms:
            tokens = calls[self.norms[name]].output
        if self.tokens == 'class':
            return [tokens[:, count]]
        mask = student.keep_masks[-1][-1].flatten(1)
        classes = mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])
        return [tokens * torch.cat([mask, classes], dim=1)[..., None]]


@AUXILIARY_LOSSES.register_module()
class LogitDistillation(AuxiliaryLoss):
    """Kullback-Leibler divergence between the class scores of a dense head and the teacher's.

    Softmax heads: divergence of the class distributions, averaged over positions. Sigmoid heads:
    divergence of the binary distribution of each class, summed and divided by the number of
    positives the teacher expects in the image, which is the sum of its probabilities (at least 1):
    as in the focal loss, an average over thousands of background anchors would be next to nothing.
    Both are averaged over images and heads and multiplied by ``temperature ** 2``. Box deltas and
    other outputs are left out.

    A head is a module whose ``forward`` takes the output of ``extract_feat``: ``bbox_head`` of a
    single-stage detector, ``rpn_head`` of a two-stage one, ``decode_head`` of a segmentor. Of a
    tuple of outputs the first, by mmdet's convention, holds class scores.

    Args:
        teacher: As in ``FeatureDistillation``; losses with the same teacher share it.
        modules: Names of the heads in the model.
        temperature: Divisor of the logits.

    Further arguments, and errors, are those of ``AuxiliaryLoss``.
    """

    def __init__(
        self,
        teacher: dict[str, Any] | str | None = None,
        modules: Sequence[str] = (),
        loss_weight: float = 1.0,
        temperature: float = 1.0,
        name: str = 'loss_distill_logits',
    ) -> None:
        super().__init__(loss_weight, name)
        self.described = check_description(teacher)
        if isinstance(modules, str) or not modules or not all(isinstance(m, str) for m in modules):
            raise TypeError(f"modules={modules!r} must be names of heads, such as ('bbox_head',)")
        if not temperature > 0:
            raise ValueError(f'temperature={temperature} must be above 0')
        self.names = tuple(modules)
        self.temperature = temperature

    def prepare(self, model: nn.Module, backbones: Mapping[str, Any], teachers: Teachers) -> None:
        self.teacher: Teacher = teachers.get(self.described)
        find_modules(model, self.names, 'modules', 'model')
        find_modules(self.teacher.model, self.names, 'modules', 'teacher')
        if not hasattr(self.teacher.model, 'extract_feat'):
            raise SettingError(
                f'LogitDistillation needs a teacher with extract_feat, which '
                f'{type(self.teacher.model).__name__} does not have'
            )
        self.teacher.heads.update(self.names)

    def modules(self) -> Iterable[str]:
        return self.names

    def __call__(self, step: Step) -> Tensor:
        taught = self.teacher.calls(step)
        parts = []
        for name in self.names:
            if name not in step.calls:
                raise RuntimeError(f'modules names {name!r}, whose forward the loss never called')
            head = step.model.get_submodule(name)
            own = class_scores(step.calls[name].output, head)
            other = class_scores(taught[name].output, head)
            check_same_shapes(own, other, f'class scores of {name}')
            parts.append(divergence(own, other, self.temperature, is_sigmoid(head)))
        return self.loss_weight * torch.stack(parts).mean()


def feature_maps(output: Any) -> list[Tensor]:
    """Maps (B, C, H, W) of a backbone's output; of [map, class token] pairs the map."""
    outputs = output if isinstance(output, (list, tuple)) else [output]
    return [part if isinstance(part, Tensor) else part[0] for part in outputs]


def direction_distance(own: Tensor, other: Tensor) -> Tensor:
    """Mean over images and positions of the squared distance of unit features (B, C, ...)."""
    own, other = (F.normalize(exact(part), dim=1) for part in (own, other))
    return (own - other).square().sum(dim=1).mean()


def class_scores(output: Any, head: nn.Module) -> list[Tensor]:
    """Class logits of each level, (B, anchors, K, H, W), from what a dense head returned."""
    while isinstance(output, (list, tuple)) and isinstance(output[0], (list, tuple)):
        output = output[0]
    maps = [output] if isinstance(output, Tensor) else list(output)
    own_classes = getattr(head, 'cls_out_channels', None)
    return [part.unflatten(1, (-1, own_classes or part.shape[1])) for part in maps]


def is_sigmoid(head: nn.Module) -> bool:
    """Whether a head's class scores go through a sigmoid rather than a softmax."""
    if hasattr(head, 'use_sigmoid_cls'):
        return bool(head.use_sigmoid_cls)
    losses = getattr(head, 'loss_decode', None) or getattr(head, 'loss_cls', None)
    parts = losses if isinstance(losses, nn.ModuleList) else [losses]
    return getattr(head, 'out_channels', None) == 1 or any(
        getattr(part, 'use_sigmoid', False) for part in parts
    )


def divergence(own: list[Tensor], other: list[Tensor], temperature: float, sigmoid: bool) -> Tensor:
    """Divergence of a head's class scores from the teacher's, a mean over images.

    Both are logits (B, anchors, K, H, W) of each level; with ``sigmoid`` classes are independent.
    """
    sums, positives = [], []
    for student, teacher in zip(own, other, strict=True):
        found, goal = (exact(level) / temperature for level in (student, teacher))
        if sigmoid:
            positives.append(exact(teacher).sigmoid().flatten(1).sum(dim=1))
            found, goal = (F.logsigmoid(torch.stack([x, -x], dim=1)) for x in (found, goal))
        else:
            found, goal = found.log_softmax(dim=2), goal.log_softmax(dim=2)
        pointwise = F.kl_div(found, goal, reduction='none', log_target=True)
        sums.append(temperature**2 * pointwise.flatten(1).sum(dim=1))
    if sigmoid:
        count = torch.stack(positives).sum(dim=0).clamp(min=1.0)
    else:
        count = sum(level[0].numel() // level.shape[2] for level in other)
    return (torch.stack(sums).sum(dim=0) / count).mean()


def check_same_shapes(own: list[Tensor], other: list[Tensor], what: str) -> None:
    """Raise a ValueError where student and teacher give other numbers or shapes of tensors."""
    shapes = [[tuple(part.shape) for part in parts] for parts in (own, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f'{what} differ: the student gives {shapes[0]}, the teacher {shapes[1]}; a teacher '
            'must have outputs of the same number and shape'
        )
