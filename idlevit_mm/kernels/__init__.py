"""The one room for code that depends on the device, on precision, or on who runs it."""

from .backends import (
    BACKENDS,
    backend_at,
    backend_for,
    tell_why_not,
    use,
    use_backend,
    why_not,
)
from .cpu import CPU
from .operators import TRAFFIC
from .pace import PACES, Pace, pace_of
from .plain import LINEAR, all_plain, is_plain, kind_of, known_plain
from .reference import Reference, split_heads
from .rows import put_rows, take_rows
from .site import Site, exact, full_precision, ranking_precision, reads_values, site_of
from .slots import WindowCore, attend_pairs, hide, join_heads, region_mask
from .triton import Triton
