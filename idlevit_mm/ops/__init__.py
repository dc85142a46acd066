"""Pure tensor functions: index tables, top-k selection, gather and scatter of tokens."""

from .layout import UnitLayout, WindowLayout, map_units, window_layout, window_units
from .select import (
    Selection,
    keep_mask,
    num_active,
    put_tokens,
    select_units,
    take_tokens,
    unit_scores,
)

__all__ = [
    'Selection',
    'UnitLayout',
    'WindowLayout',
    'keep_mask',
    'map_units',
    'num_active',
    'put_tokens',
    'select_units',
    'take_tokens',
    'unit_scores',
    'window_layout',
    'window_units',
]
