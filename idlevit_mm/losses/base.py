"""What a training signal is, and how it is built from a config."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..registry import AUXILIARY_LOSSES, build_from
from .capture import Step
from .teacher import Teachers


class AuxiliaryLoss(ABC):
    """A loss that is added to those of a model while it trains.

    Args:
        loss_weight: Factor of the loss; at least 0.
        name: Its key among the losses. mmengine sums and logs keys that contain ``loss``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is not allowed, such as a ``name`` that would not be summed.
    """

    needs_inputs = False  # whether idle backbones must record the inputs of their blocks

    def __init__(self, loss_weight: float, name: str) -> None:
        if isinstance(loss_weight, bool) or not isinstance(loss_weight, (int, float)):
            raise TypeError(f'loss_weight={loss_weight!r} must be a number')
        if not loss_weight >= 0:
            raise ValueError(f'loss_weight={loss_weight} must be at least 0')
        if not isinstance(name, str) or 'loss' not in name:
            raise ValueError(
                f"name={name!r} must contain 'loss': mmengine sums no other key into the loss"
            )
        self.loss_weight = loss_weight
        self.name = name

    @abstractmethod
    def prepare(self, model: nn.Module, backbones: Mapping[str, Any], teachers: Teachers) -> None:
        """Look once, before training, at the student, without wrappers and with weights loaded.

        ``backbones`` are its idle ones by name; losses with the same teacher share it.

        Raises:
            SettingError: The loss cannot be computed for this model.
        """

    @abstractmethod
    def __call__(self, step: Step) -> Tensor:
        """Compute the weighted loss of a forward pass: a scalar with graph."""

    def modules(self) -> Iterable[str]:
        """Names of the modules whose calls the loss wants to see."""
        return ()


def build_losses(losses: Sequence[dict[str, Any] | AuxiliaryLoss]) -> list[AuxiliaryLoss]:
    """Build losses from dicts with ``type`` and arguments; those that are built stay as they are.

    Raises:
        TypeError: It is no list of dicts, or a loss does not take an argument given to it.
        ValueError: There is none, one is unknown, or two have the same name.
    """
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f'losses={losses!r} must be a list of dicts with a type')
    if not losses:
        raise ValueError(
            f'losses={losses!r} must name at least one of '
            f'{", ".join(sorted(AUXILIARY_LOSSES.module_dict))}'
        )
    built = [
        loss if isinstance(loss, AuxiliaryLoss) else build_from(AUXILIARY_LOSSES, 'losses', loss)
        for loss in losses
    ]
    names = [loss.name for loss in built]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'losses has name={name!r} twice; give one of them another name')
    return built
