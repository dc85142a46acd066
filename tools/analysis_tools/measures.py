"""How long several callables take, compared fairly in one process, and the memory of one call.

Timings taken one after the other drift with temperature, clock speed and other users of the
machine. Here all take turns: each round times every one of them once, in an order that changes, and
ratios are formed within a round before the median is taken, so that a slow spell hits both sides.

Memory is what is allocated above the level at the start of a call. It is not the size of the
process, which on a CPU depends on what the allocator has kept from before.
"""

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler import profile
from torch.utils import collect_env

from idlevit_mm.errors import UsageError, one_line, reason

_LIBRARIES = (
    *('torch', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmcv-lite', 'onedl-mmcv', 'mmdet'),
    *('onedl-mmdetection', 'mmsegmentation', 'onedl-mmsegmentation', 'mmpretrain'),
    *('onedl-mmpretrain', 'timm', 'numpy'),
    *('onnx', 'onnxscript', 'onnxruntime', 'openvino'),
)


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


def compare_working(
    makers: Mapping[str, Callable[[], Callable[[], Any]]], reference: str, *limits: Any
) -> tuple[dict[str, Callable[[], Any]], dict[str, list[float]], dict[str, str]]:
    """``compare``, by rounds and other limits, of those candidates that can be made and called.

    Returns:
        These candidates, their seconds by round, and why the others failed. Nothing is timed where
        the reference fails.
    """
    candidates: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            candidates[name] = make()
        except Exception as error:
            failed[name] = reason(error)
    while reference in candidates and not seconds:
        try:
            seconds = compare(candidates, *limits)
        except CandidateError as failure:
            failed[failure.name] = reason(failure.__cause__ or failure)
            del candidates[failure.name]
        # Not in the handler: there, the traceback still holds what the candidate had allocated.
        gc.collect()
        torch.cuda.empty_cache()
    for name in candidates if not seconds else ():
        failed[name] = f'nothing to compare with: {reference} failed'
    return candidates, seconds, failed


@contextmanager
def strictly_compiled() -> Iterator[None]:
    """Forget what was compiled before, and never fall back to eager code without a word."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        yield


def captured(call: Callable[[], Any], warmup: int = 3) -> Callable[[], Any]:
    """A call recorded as a CUDA graph: to replay it costs one launch, and returns the same tensors.

    Raises:
        RuntimeError: It waits for the device, or does something else that no graph can hold.
    """
    # Libraries choose and allocate in their first calls, which are not to be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = call()

    # What it reads is of the call's: weights must not go before the graph does.
    def replay(_: Any = call) -> Any:
        graph.replay()
        return result

    return replay


def moment() -> Any:
    """Now: a CUDA event where CUDA is in use, otherwise the clock's seconds."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds from one moment to another."""
    if not isinstance(begin, torch.cuda.Event):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, by the clock or on the CUDA device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    begin = moment()
    call()
    return seconds_between(begin, moment())


def spread(values: Sequence[float], others: Sequence[float] | float = 1.0) -> list[float]:
    """Median and both quartiles of values, or of their quotients with others of the same rounds."""
    return np.quantile(np.divide(values, others), (0.5, 0.25, 0.75)).tolist()


def peak_of(changes: Iterable[int]) -> int:
    """Highest level above the start that bytes allocated (positive) and freed (negative) reach."""
    return max(accumulate(changes, initial=0))


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes allocated and freed on the CPU by torch during a call, in order.

    What a library allocates for itself (scratch of oneDNN's convolutions) is not seen.
    """
    with profile(use_device=None, profile_memory=True) as recorded:
        call()
    events = recorded.kineto_results.events()  # type: ignore[union-attr]
    own = [e for e in events if e.name() == '[memory]']
    own = [e for e in own if e.device_type() == torch.autograd.DeviceType.CPU]
    # The sort is stable: what happens in the same nanosecond keeps its order.
    return [event.nbytes() for event in sorted(own, key=lambda event: event.start_ns())]


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call allocates at most above the level at its start, on a CPU or with CUDA.

    It has run before, so that tables and workspaces that stay are there already.
    """
    if device.type == 'cpu':
        return peak_of(allocations(call))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    level = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - level


def started(device: str, threads: int | None = None) -> torch.device:
    """A device that is in use from now on, by everything that names none.

    On a CPU with so many computing threads, by default as many as there are.

    Raises:
        UsageError: there is no such device, or it cannot be used.
    """
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'--device {device}: {one_line(error)}') from error
    if place.type == 'cuda':
        torch.cuda.set_device(place)
    if threads is not None:
        torch.set_num_threads(threads)
    return place


def keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed, for as long as this process runs.

    Otherwise large tensors come with page faults or without, as sizes that were freed before had
    it: the same model takes half as long again in one process as in another.
    """
    trim_threshold, mmap_max = -1, -4  # names of mallopt's settings in malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)
        library.mallopt(mmap_max, 0)


def machine() -> str:
    """Processor and number of cores, for the record; and the GPU if one is in use."""
    info = Path('/proc/cpuinfo')
    found = re.findall(r'model name\s*: (.*)', info.read_text() if info.is_file() else '')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    text = f'{[*found, platform.processor() or platform.machine()][0]}, {cores} cores'
    if not torch.cuda.is_initialized():
        return text
    driver = collect_env.get_nvidia_driver_version(collect_env.run) or 'unknown'
    cuda = f'CUDA {torch.version.cuda}, driver {driver}'
    return f'{torch.cuda.get_device_name()} ({cuda}), {text}'


def versions() -> str:
    """Versions of Python and the libraries that a measurement depends on."""
    found = {dist.metadata['Name']: dist.version for dist in importlib.metadata.distributions()}
    listed = [f'{name} {found[name]}' for name in _LIBRARIES if name in found]
    return ', '.join([f'Python {platform.python_version()}', *listed])
