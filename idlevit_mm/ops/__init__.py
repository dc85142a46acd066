"""What follows from sizes alone, and how rows of tokens are named."""

from .extent import Extent, Sizes, extent_of, filled_sizes, mean_inside, units_inside
from .geometry import (
    CACHED_TABLES,
    Units,
    WindowLayout,
    map_units,
    on_device,
    window_layout,
    window_numbers,
    window_units,
)
from .rows import Rows, row_mask
from .shape import pad_to, to_map, to_tokens
