"""A mask of rows says which of the first ones are among them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlevit_mm.ops import Rows, row_mask

quick = settings(deadline=None, max_examples=60, derandomize=True)


@given(
    st.integers(1, 9).flatmap(
        lambda count: st.lists(
            st.lists(st.integers(-1, 12), min_size=count, max_size=count), min_size=1, max_size=3
        )
    ),
    st.integers(1, 10),
)
@quick
def test_rows_behind_the_first_ones_and_padding_are_left_out(ids, num_rows):
    """Class tokens and fused ones lie behind the map, of which masks are drawn."""
    mask = row_mask(Rows(torch.tensor(ids), padded=True), num_rows)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[row in some for row in range(num_rows)] for some in ids]
