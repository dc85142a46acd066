"""Which rows of a sequence of tokens a block computes.

One id space: a sequence x is (B, S, C), whose rows 0 to N - 1 are the map, row by row; then come
the class tokens, then rows that a policy has appended. An id is a row number of x; -1 is padding.

Shape letters: B images, S rows of x, N tokens of the map, C channels, T computed rows, K windows, M
windows of a map.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Some rows of x.

    Attributes:
        ids: (B, T), distinct row numbers; -1 for padding.
        windows: (B, K), numbers of the windows where rows are whole windows, slot by slot.
        padded: Whether ids may hold -1.
        offsets: (B * M + 1,), where the rows of each window of the batch begin among all B * T, if
            they lie window by window; windows row by row.
        places: (B, N), place of each token of the map among all B * T rows; -1 where it has none.
    """

    ids: Tensor
    windows: Tensor | None = None
    padded: bool = False
    offsets: Tensor | None = None
    places: Tensor | None = None


def row_mask(rows: Rows, num_rows: int) -> Tensor:
    """Which of the first ``num_rows`` rows are among some: (B, num_rows), bool."""
    ids = rows.ids
    inside = torch.where((ids < 0) | (ids >= num_rows), num_rows, ids)
    mask = ids.new_zeros(ids.shape[0], num_rows + 1, dtype=torch.bool)
    # Not True: torch.jit knows no scatter of a bool.
    return mask.scatter(1, inside, 1)[:, :num_rows]
