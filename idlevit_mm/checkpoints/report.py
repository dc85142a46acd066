"""What became of the weights of a checkpoint: for logs, the command line and errors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..errors import shortened
from .weights import FOLLOWING, PACE, StateDict

Shape = tuple[int, ...]

# Scorers that learn, and the pace of a device, belong to idling: no dense network has them.
IDLING = {'policy', 'payer'}


def of_policy(key: str) -> bool:
    """Whether a weight belongs to an idling policy."""
    return not IDLING.isdisjoint(key.split('.'))


@dataclass
class WeightsReport:
    """Which weights went from a checkpoint into a model or another checkpoint.

    Attributes:
        matched: Weights that went over.
        missing: Weights that the model has and the checkpoint lacks.
        unexpected: Weights of the checkpoint that the model has not.
        mismatched: Weights of another shape: (that of the checkpoint, that of the model).
        resized: Position tables by their new names: (old shape, new shape).
        dropped: Weights, by their old names, for which the new names have no place.
        added: Weights, by their new names, that were made up without changing features.
    """

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    def misfit(self) -> str:
        """In words what keeps the checkpoint from being exactly the model's; '' for nothing."""
        reasons = {
            'lacks': self.missing,
            'has unknown': self.unexpected,
            'has another shape of': list(self.mismatched),
        }
        return ', '.join(
            f'{what} {counted(names)} (such as {min(names)})'
            for what, names in reasons.items()
            if names
        )

    def summary(self) -> str:
        """One line with the numbers and the first names of each kind."""
        parts = [counted(self.matched)]
        parts += [f'{title}: {shortened(lines)}' for title, lines in self._kinds() if lines]
        return '; '.join(parts)

    def lines(self) -> list[str]:
        """The number of each kind with all of its names, one text for each line of output."""
        lines = [counted(self.matched)]
        for title, names in self._kinds():
            if names:
                lines.append(f'{len(names)} {title}:')
                lines += [f'  {name}' for name in names]
        return lines

    def _kinds(self) -> list[tuple[str, list[str]]]:
        return [
            ('resized', with_shapes(self.resized, 'to')),
            ('of another shape', with_shapes(self.mismatched, 'not')),
            ('missing', self.missing),
            ('not used', self.unexpected),
            ('dropped', self.dropped),
            ('added', self.added),
        ]


def compare(own: StateDict, given: StateDict, policy_too: bool = True) -> WeightsReport:
    """Compare the weights of a model with those of a checkpoint.

    Args:
        own: Weights of the model.
        given: Weights of the checkpoint.
        policy_too: Whether the checkpoint must have weights of idling policies.

    What follows from the window or the device, and is made anew, may be absent or of another shape.
    """
    unknown = [key for key in given if key not in own and not key.endswith(PACE)]
    report = WeightsReport(unexpected=unknown)
    for key, value in own.items():
        if key.endswith((*FOLLOWING, PACE)):
            report.matched += [key] * (key in given)
        elif key not in given:
            if policy_too or not of_policy(key):
                report.missing.append(key)
        elif given[key].shape != value.shape:
            report.mismatched[key] = tuple(given[key].shape), tuple(value.shape)
        else:
            report.matched.append(key)
    return report


def counted(names: Collection[str]) -> str:
    """``1 weight``, ``2 weights``."""
    return f'{len(names)} weight{"" if len(names) == 1 else "s"}'


def with_shapes(shapes: dict[str, tuple[Shape, Shape]], word: str) -> list[str]:
    """``key (4, 2) to (8, 2)`` for each key; ``word`` stands between the shapes."""
    return [f'{key} {first} {word} {second}' for key, (first, second) in shapes.items()]
