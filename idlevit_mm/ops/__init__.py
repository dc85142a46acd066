"""Pure tensor functions: index tables, top-k selection, gather and scatter of tokens."""

from .chunks import channel_parts, in_chunks
from .layout import UnitLayout, WindowLayout, map_units, window_layout, window_units
from .packing import Bucket, WindowPacking, pack_whole_windows, pack_windows
from .runtime import autocasts, eager_on_cpu, full_precision
from .select import (
    ROUNDINGS,
    Selection,
    behind_prefix,
    best_places,
    fill_map,
    keep_mask,
    num_active,
    put_tokens,
    select_units,
    take_tokens,
    unit_scores,
)

__all__ = [
    'ROUNDINGS',
    'Bucket',
    'Selection',
    'UnitLayout',
    'WindowLayout',
    'WindowPacking',
    'autocasts',
    'behind_prefix',
    'channel_parts',
    'in_chunks',
    'best_places',
    'eager_on_cpu',
    'fill_map',
    'full_precision',
    'keep_mask',
    'map_units',
    'num_active',
    'pack_whole_windows',
    'pack_windows',
    'put_tokens',
    'select_units',
    'take_tokens',
    'unit_scores',
    'window_layout',
    'window_units',
]
