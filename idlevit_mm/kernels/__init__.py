"""The one room for code that depends on the device, on precision, or on who runs it."""

from .backends import BACKENDS, backend_at, backend_for, use_backend, why_not
from .cpu import CPU
from .plain import LINEAR, all_plain, is_plain, known_plain
from .reference import Reference, split_heads
from .rows import put_rows, take_rows
from .site import Site, exact, full_precision, ranking_precision, site_of
from .slots import WindowCore, hide, region_mask

__all__ = [
    'BACKENDS',
    'CPU',
    'LINEAR',
    'Reference',
    'Site',
    'WindowCore',
    'all_plain',
    'backend_at',
    'backend_for',
    'exact',
    'full_precision',
    'hide',
    'is_plain',
    'known_plain',
    'put_rows',
    'ranking_precision',
    'region_mask',
    'site_of',
    'split_heads',
    'take_rows',
    'use_backend',
    'why_not',
]
