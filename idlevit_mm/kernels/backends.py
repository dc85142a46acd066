"""Which backend computes: one list, one predicate, one answer."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import print_log
from torch import Tensor

from .cpu import CPU, native
from .reference import Reference
from .site import FORCED, Site, site_of
from .triton import Triton

_REFERENCE = Reference()
# The first that can be taken is; the reference always can.
BACKENDS: list[Reference] = [Triton(), CPU(), _REFERENCE]
# What the reference is called besides.
_ALIASES = {'torch': 'reference'}
# Reasons that have been logged.
_TOLD: set[str] = set()


def backend_for(site: Site) -> Reference:
    """The first backend that can be taken in some circumstances; of one name within a context."""
    for backend in BACKENDS:
        if FORCED and backend.name != FORCED[-1]:
            continue
        if not backend.why_not(site):
            return backend
    return _REFERENCE


def backend_at(x: Tensor) -> Reference:
    """The backend that computes with x."""
    return backend_for(site_of(x))


def why_not(site: Site) -> dict[str, str]:
    """In words why backends are not taken in some circumstances, by name."""
    taken, reasons = backend_for(site), {}
    forced = f'use_backend({FORCED[-1]!r}) is in force' if FORCED else ''
    # Compilers read this loop, and no itertools.
    for backend in BACKENDS:
        if backend is taken:
            break
        reasons[backend.name] = backend.why_not(site) or forced
    return reasons


def tell_why_not(x: Tensor) -> None:
    """Log once why the kernels of a device are not used for inference on x."""
    site = site_of(x)
    if not site.eager or site.grad:
        return
    reasons = {'cuda': lambda: why_not(site).get('triton'), 'cpu': native.why_not}
    reason = reasons.get(site.device, str)()
    if reason and reason not in _TOLD:
        _TOLD.add(reason)
        print_log(f'The kernels for {site.device} are not used: {reason}', 'current')


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take one backend alone, or the reference where it cannot be taken: for tests, benchmarks.

    For all threads of the process, and for what is compiled within.

    Raises:
        ValueError: It is unknown.
    """
    name = _ALIASES.get(name, name)
    names = [backend.name for backend in BACKENDS]
    if name not in names:
        raise ValueError(f'backend={name!r} is unknown; allowed: {", ".join(names)}')
    FORCED.append(name)
    try:
        yield
    finally:
        FORCED.pop()


use = use_backend
