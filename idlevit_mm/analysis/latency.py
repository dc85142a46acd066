"""How long several callables take, compared fairly in one process.

Timings taken one after the other drift with temperature, clock speed and other users of the
machine. Here all candidates take turns: each round times every one of them once, in an order
that is turned round from round to round, and ratios are formed within a round before the median
is taken, so that a slow spell hits both sides of a ratio.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_T = TypeVar('_T')


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, first and third quartile of at least one value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """Times of all candidates, round by round.

    Attributes:
        seconds: ``{name: one time per round}``, the same number of rounds for each.
        reference: the candidate that the others are compared with.
    """

    seconds: Mapping[str, tuple[float, ...]]
    reference: str

    def time(self, name: str) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, reference: str | None = None) -> Spread:
        """Time of a candidate divided by the reference's time in the same round."""
        others = self.seconds[reference or self.reference]
        return Spread.of(
            [own / other for own, other in zip(self.seconds[name], others, strict=True)]
        )


class CandidateError(RuntimeError):
    """A candidate failed while it was called; the cause is the exception it raised.

    Attributes:
        name: of the candidate.
    """

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f'{name}: {cause}')
        self.name = name


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    reference: str | None = None,
    rounds: int = 30,
    warmup: int = 3,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> Comparison:
    """Time several callables in turns, without gradients.

    Args:
        candidates: ``{name: callable without arguments}``.
        reference: name to compare with; the first one when None.
        rounds: how often each candidate is timed.
        warmup: untimed calls of each candidate before the first round.
        max_seconds: stop after the round in which this much time has passed, but never before
            three rounds; None for no limit.
        clock: returns seconds.
        synchronize: waits until the device is idle; CUDA's own when None and CUDA is in use.
        timer: calls a candidate and returns the seconds it took; by ``clock`` when None.

    Returns:
        The times of every round.

    Raises:
        ValueError: no candidates, an unknown reference, or fewer than one round.
        CandidateError: a candidate raised an exception.
    """
    if not candidates:
        raise ValueError('candidates={} must hold at least one callable')
    names = list(candidates)
    reference = names[0] if reference is None else reference
    if reference not in candidates:
        raise ValueError(f'reference={reference!r} must be one of {names}')
    if rounds < 1 or warmup < 0:
        raise ValueError(f'rounds={rounds} must be at least 1 and warmup={warmup} at least 0')
    if synchronize is None:
        synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
    if timer is None:
        timer = functools.partial(_timed, clock=clock, synchronize=synchronize)

    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    with torch.no_grad():
        for name in names:
            for _ in range(warmup):
                _attempt(name, candidates[name])
        gc.collect()
        gc.disable()
        try:
            synchronize()
            started = clock()
            for index in range(rounds):
                for name in _turn(names, index):
                    seconds[name].append(_attempt(name, timer, candidates[name]))
                if max_seconds is not None and index >= 2 and clock() - started >= max_seconds:
                    break
        finally:
            if collecting:
                gc.enable()
    return Comparison({name: tuple(times) for name, times in seconds.items()}, reference)


def cuda_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call by CUDA events, on the current stream of an idle device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def realised_share(time_ratio: float, operation_ratio: float) -> float:
    """How much of the saved operations is saved time.

    Args:
        time_ratio: time of the idle model / time of the dense one.
        operation_ratio: multiply-adds of the idle model / multiply-adds of the dense one.

    Returns:
        (time dense / time idle) / (multiply-adds dense / multiply-adds idle); 1.0 means that
        every saved operation is saved time.
    """
    return operation_ratio / time_ratio


def _timed(
    call: Callable[[], Any], clock: Callable[[], float], synchronize: Callable[[], None]
) -> float:
    """Seconds of one call, until the device is idle."""
    begin = clock()
    call()
    synchronize()
    return clock() - begin


def _attempt(name: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function and say whose failure an exception is."""
    try:
        return function(*args)
    except Exception as error:
        raise CandidateError(name, error) from error


def _turn(names: Sequence[str], index: int) -> list[str]:
    """The order of one round: each candidate starts in its turn, every second cycle backwards."""
    shift = index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if (index // len(names)) % 2 else order


def _nothing() -> None:
    """Stand in for a device's synchronisation where there is no such device."""
