"""Reads a meter (a clock, a count of operations) at the borders of calls, without touching code.

Methods and functions are replaced for the duration of a ``with`` block, so that nothing that is
measured has to be written for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

OTHER = 'other'

# What a call is charged to, or how that follows from what the call around it is charged to.
Label = str | Callable[[str], str]


class Call(NamedTuple):
    """A call to measure.

    Attributes:
        label: What its cost is charged to; or a function of what the call around it is charged to,
            'other' where there is none.
        owner: An object or a Python module.
        name: The attribute of the owner that is called.
    """

    label: Label
    owner: Any
    name: str


class Meter:
    """Charges what a meter gains to the innermost call that is running.

    So the charges of all labels add up to the whole, and what a call spends in another measured
    call is not its own.

    Args:
        reading: Returns the meter's present state.

    Attributes:
        totals: ``{label: what was charged to it}``, in the order of first use.
    """

    def __init__(self, reading: Callable[[], float]) -> None:
        self.totals: dict[str, float] = {}
        self._reading = reading
        self._running: list[str] = []
        self._last = reading()

    @property
    def running(self) -> str:
        """What is being charged to now."""
        return self._running[-1] if self._running else OTHER

    def charge(self) -> None:
        """Charge what was gained since the last border to the running call."""
        now = self._reading()
        label = self.running
        self.totals[label] = self.totals.get(label, 0) + now - self._last
        self._last = now

    def restart(self) -> None:
        """Forget all charges, and what was gained since the last border."""
        self.totals.clear()
        self._last = self._reading()

    def enter(self, label: Label) -> None:
        """From here on charge to a label."""
        self.charge()
        self._running.append(label if isinstance(label, str) else label(self.running))

    def leave(self) -> None:
        """Charge to the call around this one again."""
        self.charge()
        self._running.pop()

    def relabel(self, label: str) -> None:
        """From here on charge the rest of the running call to another label."""
        self.charge()
        if self._running:
            self._running[-1] = label

    def around(self, label: Label, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is charged to a label."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.enter(label)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        # The kernels pass over layers as they do without it.
        measured.only_measures = True  # type: ignore[attr-defined]
        return measured


@contextmanager
def metered(calls: Iterable[Call], reading: Callable[[], float]) -> Iterator[Meter]:
    """Measure calls for the duration of a ``with`` block.

    Args:
        calls: What to measure. An attribute that an owner does not have is left out, and one that
            is named twice counts for its first label.
        reading: Returns the meter's present state.
    """
    meter = Meter(reading)
    with replaced(calls, meter.around):
        yield meter


@contextmanager
def replaced(
    calls: Iterable[Call], around: Callable[[Label, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace functions of objects or Python modules for the duration of a ``with`` block.

    Args:
        calls: What to replace.
        around: Makes the replacement from the label and the function.
    """
    missing = object()
    before: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    try:
        for label, owner, name in calls:
            function = getattr(owner, name, None)
            if function is None or (id(owner), name) in before:
                continue
            before[id(owner), name] = owner, name, vars(owner).get(name, missing)
            setattr(owner, name, around(label, function))
        yield
    finally:
        for owner, name, own in before.values():
            if own is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def module_calls(
    label: Label, module: nn.Module, names: Iterable[str] = ('forward',)
) -> list[Call]:
    """Calls of a module and of all modules in it, whichever of them is called first."""
    return [Call(label, part, name) for part in module.modules() for name in names]


def clock() -> float:
    """Seconds, once the device has done what it was asked to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
