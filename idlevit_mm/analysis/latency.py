"""How long several callables take, compared fairly in one process.

Timings taken one after the other drift with temperature, clock speed and other users of the
machine. Here all take turns: each round times every one of them once, in an order that changes, and
ratios are formed within a round before the median is taken, so that a slow spell hits both sides.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

_LIBRARIES = (
    *('torch', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmcv-lite', 'onedl-mmcv', 'mmdet'),
    *('onedl-mmdetection', 'mmsegmentation', 'onedl-mmsegmentation', 'timm', 'numpy'),
    *('onnx', 'onnxscript', 'onnxruntime', 'openvino'),
)


class Spread(NamedTuple):
    """Median, first and third quartile of some values."""

    median: float
    low: float
    high: float


class CandidateError(RuntimeError):
    """The candidate of that name failed while it was called; the cause is what it raised."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f'{name}: {cause}')
        self.name = name


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 30,
    warmup: int = 3,
    max_seconds: float | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of several callables by round, timed in turns and without gradients.

    Each is called ``warmup`` times, then once per round. ``max_seconds`` ends it after the round in
    which the timed calls have taken so much together, but never before three rounds. ``timer``
    calls a candidate and returns its seconds; ``seconds_of`` when None.

    Raises:
        ValueError: no candidates, or fewer than one round.
        CandidateError: a candidate raised an exception.
    """
    if not candidates:
        raise ValueError('candidates={} must hold at least one callable')
    if rounds < 1 or warmup < 0:
        raise ValueError(f'rounds={rounds} must be at least 1 and warmup={warmup} at least 0')
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    try:
        with torch.no_grad():
            for name in [name for name in names for _ in range(warmup)]:
                candidates[name]()
            gc.collect()
            gc.disable()
            for index in range(rounds):
                # Each candidate starts in its turn, every second cycle goes backwards.
                shift, way = index % len(names), (-1) ** (index // len(names))
                for name in [*names[shift:], *names[:shift]][::way]:
                    seconds[name].append((timer or seconds_of)(candidates[name]))
                spent = sum(map(sum, seconds.values()))
                if max_seconds is not None and index >= 2 and spent >= max_seconds:
                    break
    except Exception as error:
        raise CandidateError(name, error) from error
    finally:
        if collecting:
            gc.enable()
    return seconds


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, by CUDA events where CUDA is in use, otherwise by the clock."""
    if not torch.cuda.is_initialized():
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def spread(values: Sequence[float], others: Sequence[float] | float = 1.0) -> Spread:
    """Median and quartiles of values, or of their quotients with others of the same rounds."""
    return Spread(*np.quantile(np.divide(values, others), (0.5, 0.25, 0.75)).tolist())


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
