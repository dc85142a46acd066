"""How long several callables take, compared fairly in one process.

Timings taken one after the other drift with temperature, clock speed and other users of the
machine. Here all candidates take turns: each round times every one of them once, in an order
that is turned round from round to round, and ratios are formed within a round before the median
is taken, so that a slow spell hits both sides of a ratio.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .models import blank_data_samples

PARTS = ('backbone', 'model')
_LIBRARIES = (
    *('torch', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmcv-lite', 'onedl-mmcv', 'mmdet'),
    *('onedl-mmdetection', 'mmsegmentation', 'onedl-mmsegmentation', 'timm', 'numpy'),
)


class Spread(NamedTuple):
    """Median and quartiles of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, first and third quartile of at least one value."""
        values = [*values] * 2 if len(values) == 1 else values
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)


class Comparison(NamedTuple):
    """Times of all candidates, one per round, and with whom the others are compared."""

    seconds: Mapping[str, tuple[float, ...]]
    reference: str

    def time(self, name: str) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, reference: str | None = None) -> Spread:
        """Time of a candidate divided by the reference's time in the same round."""
        others = self.seconds[reference or self.reference]
        pairs = zip(self.seconds[name], others, strict=True)
        return Spread.of([own / other for own, other in pairs])


class CandidateError(RuntimeError):
    """The candidate of that name failed while it was called; the cause is what it raised."""

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
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> Comparison:
    """Time several callables in turns, without gradients, against the first or another of them.

    Each is called ``warmup`` times, then once per round. ``max_seconds`` ends it after the round in
    which the timed calls have taken so much together, but never before three rounds. ``timer``
    calls a candidate and returns its seconds; ``seconds_of`` when None.

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
    timer = seconds_of if timer is None else timer
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    try:
        with torch.no_grad():
            for name in names:
                for _ in range(warmup):
                    candidates[name]()
            gc.collect()
            gc.disable()
            for index in range(rounds):
                for name in _turn(names, index):
                    seconds[name].append(timer(candidates[name]))
                spent = sum(map(sum, seconds.values()))
                if max_seconds is not None and index >= 2 and spent >= max_seconds:
                    break
    except Exception as error:
        raise CandidateError(name, error) from error
    finally:
        if collecting:
            gc.enable()
    return Comparison({name: tuple(times) for name, times in seconds.items()}, reference)


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, by CUDA events where CUDA is in use, otherwise by the clock."""
    if not torch.cuda.is_initialized():
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1000


def forward_call(
    model: nn.Module,
    inputs: Tensor,
    part: str = 'backbone',
    data_samples: Sequence[Any] | None = None,
) -> Callable[[], Any]:
    """A call that runs the backbone on images (B, 3, H, W), or the 'model' with post-processing.

    The model may be the bare backbone; a whole one gets blank data samples when there are none.

    Raises:
        ValueError: ``part`` is neither of the two.
    """
    if part not in PARTS:
        raise ValueError(f'part={part!r} must be one of {", ".join(PARTS)}')
    if part == 'backbone':
        backbone = getattr(model, 'backbone', model)
        return lambda: backbone(inputs)
    if data_samples is None:
        data_samples = blank_data_samples(model, inputs.shape)
    return lambda: model(inputs, data_samples, mode='predict')


def machine() -> str:
    """Processor and number of cores, for the record; and the GPU if one is in use."""
    info = Path('/proc/cpuinfo')
    found = re.findall(r'model name\s*: (.*)', info.read_text() if info.is_file() else '')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    text = f'{[*found, platform.processor() or platform.machine()][0]}, {cores} cores'
    if not torch.cuda.is_initialized():
        return text
    return f'{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), {text}'


def versions() -> str:
    """Versions of Python and the libraries that a measurement depends on."""
    found = {dist.metadata['Name']: dist.version for dist in importlib.metadata.distributions()}
    listed = [f'{name} {found[name]}' for name in _LIBRARIES if name in found]
    return ', '.join([f'Python {platform.python_version()}', *listed])


def _turn(names: Sequence[str], index: int) -> list[str]:
    """The order of one round: each candidate starts in its turn, every second cycle backwards."""
    shift = index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if (index // len(names)) % 2 else order
