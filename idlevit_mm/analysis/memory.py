"""Peak memory of one call: what is allocated above the level at its start.

Not the size of the process, which on a CPU depends on what the allocator has kept from before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.profiler import profile


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
