"""Adds training signals to any model that has an idle backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from ..backbones import IdleBackbone
from ..errors import SettingError
from ..losses import AuxiliaryLoss, Step, Teachers, build_losses, captured

_START = 'training_started_from'


@HOOKS.register_module()
class AuxiliaryLossHook(Hook):
    """Adds losses to those of a model while it trains.

    They are computed inside the model's own ``loss``, in the same forward pass: autocast, loss
    scaling, gradient accumulation, activation checkpointing and DDP treat them like any other, and
    mmengine logs them by name. The model's class, weights and checkpoints stay as they are.

    Args:
        losses: Configs of the losses, such as
            ``[dict(type='TokenCutLoss'), dict(type='FeatureDistillation')]``.

    Raises:
        TypeError: A loss does not take an argument given to it.
        ValueError: There is no loss, one is unknown, or a value is not allowed.
    """

    def __init__(self, losses: Sequence[dict[str, Any] | AuxiliaryLoss]) -> None:
        self.losses = build_losses(losses)
        self._undo = ExitStack()  # takes the losses out of the model

    def before_train(self, runner: Any) -> None:
        """Build the teachers and put the losses into the model.

        Raises:
            SettingError: There is another hook of this kind, or the model cannot have such losses.
        """
        self.after_train(runner)  # an exception may have ended an earlier training
        if sum(isinstance(hook, AuxiliaryLossHook) for hook in runner.hooks) > 1:
            raise SettingError('there are several AuxiliaryLossHook; put all losses into one')
        model = runner.model
        while is_model_wrapper(model):
            model = model.module
        self._undo.callback(add_losses(model, self.losses, start_of(runner)))

    def after_train(self, runner: Any) -> None:
        """Give the model its own ``loss`` back."""
        self._undo.close()


def start_of(runner: Any) -> str | None:
    """The checkpoint that a training started from, also when it was resumed since.

    A resumed runner only knows the one that it goes on from, which holds the student. So the start
    travels with the records of the training in its checkpoints.
    """
    records = runner.message_hub
    if not runner._resume:
        records.update_info(_START, runner._load_from)
    return records.get_info(_START)


def add_losses(
    model: nn.Module, losses: Sequence[AuxiliaryLoss], start: str | None = None
) -> Callable[[], None]:
    """Add losses to those that ``model.loss`` returns; also for training without a runner.

    Args:
        model: A detector or segmentor, without wrappers, weights loaded.
        losses: What to add.
        start: Checkpoint of the dense model that training starts from; losses without a teacher of
            their own take it as theirs.

    Returns:
        A function that takes them out again.

    Raises:
        SettingError: The model has no idle backbone, or a loss cannot be computed for it.
        TypeError: The model has no method ``loss``.
    """
    backbones = {
        name: module for name, module in model.named_modules() if isinstance(module, IdleBackbone)
    }
    if not backbones:
        names = ', '.join(type(loss).__name__ for loss in losses)
        raise SettingError(f'{type(model).__name__} has no idle backbone, which {names} need')
    if not callable(getattr(model, 'loss', None)):
        raise TypeError(f'{type(model).__name__} has no method loss to add losses to')
    teachers = Teachers(model, backbones, start)
    for loss in losses:
        loss.prepare(model, backbones, teachers)
    teachers.load()
    original = model.loss
    parts = {name for loss in losses for name in loss.modules()}

    def with_losses(inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with ExitStack() as stack:
            if any(loss.needs_inputs for loss in losses):
                stack.enter_context(recorded_inputs(backbones))
            modules = {name: model.get_submodule(name) for name in parts}
            calls = stack.enter_context(captured(modules))
            stack.callback(teachers.forget)
            total = dict(original(inputs, *args, **kwargs))
            samples = args[0] if args else kwargs.get('data_samples')
            # Losses may call modules again.
            step = Step(model, backbones, inputs, dict(calls), samples)
            for loss in losses:
                if loss.name in total:
                    raise SettingError(
                        f'{type(model).__name__} has a loss {loss.name!r} already; give '
                        f'{type(loss).__name__} another name'
                    )
                total[loss.name] = loss(step)
        return total

    undo = ExitStack()
    undo.enter_context(mock.patch.object(model, 'loss', with_losses))
    return undo.close


@contextmanager
def recorded_inputs(backbones: Mapping[str, IdleBackbone]) -> Iterator[None]:
    """Let backbones record the inputs of their blocks, and drop these at the end.

    They hang on the graph of the forward pass, which nothing must keep alive.
    """
    switched = [backbone for backbone in backbones.values() if not backbone.record_inputs]
    for backbone in switched:
        backbone.record_inputs = True
    try:
        yield
    finally:
        for backbone in switched:
            backbone.record_inputs = False
            backbone.records = [record._replace(inputs=()) for record in backbone.records]
