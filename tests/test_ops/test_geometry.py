"""Index tables equal padding, rolling and partitioning done step by step with torch."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from idlevit_mm.ops import map_units, window_layout, window_units

CPU = torch.device('cpu')
settings.register_profile('ops', deadline=None, max_examples=60, derandomize=True)
settings.load_profile('ops')


@st.composite
def geometries(draw):
    """(height, width, window size, shift) of any map, smaller than a window included."""
    window = draw(st.integers(1, 7))
    shift = draw(st.sampled_from(sorted({0, window // 2, draw(st.integers(0, window - 1))})))
    return draw(st.integers(1, 23)), draw(st.integers(1, 23)), window, shift


def partition(grid, window):
    """(H, W) to (windows, window * window), row by row."""
    h, w = grid.shape
    blocks = grid.reshape(h // window, window, w // window, window)
    return blocks.permute(0, 2, 1, 3).reshape(-1, window * window)


def naive_windows(h, w, window, shift):
    """Token ids and region numbers of every slot, as the dense block arrives at them."""
    ids = torch.arange(h * w).reshape(h, w)
    ids = F.pad(ids, (0, -w % window, 0, -h % window), value=-1)
    ids = torch.roll(ids, (-shift, -shift), (0, 1))
    regions = torch.zeros_like(ids)
    if shift:
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for i, rows in enumerate(cuts):
            for j, cols in enumerate(cuts):
                regions[rows, cols] = 3 * i + j
    return partition(ids, window), partition(regions, window)


def sorted_rows(table):
    return sorted(table.tolist())


@given(geometries())
def test_windows_equal_pad_roll_partition(geometry):
    h, w, window, shift = geometry
    layout = window_layout(h, w, window, shift, CPU)
    ids, regions = naive_windows(h, w, window, shift)
    # The order of the windows is the layout's own; what each holds, slot by slot, is not.
    assert sorted_rows(layout.token_ids) == sorted_rows(ids)
    where = {tuple(row): i for i, row in enumerate(ids.tolist())}
    order = [where[tuple(row)] for row in layout.token_ids.tolist()]
    assert sorted(order) == list(range(len(ids)))
    same = regions[order][:, :, None] == regions[order][:, None, :]
    inner = len(ids) - len(layout.regions)
    assert same[:inner].all(), 'a window without mask holds several regions'
    mine = layout.regions[:, :, None] == layout.regions[:, None, :]
    assert torch.equal(mine, same[inner:])


@given(geometries())
def test_every_token_has_one_slot_and_padding_minus_one(geometry):
    h, w, window, shift = geometry
    n = h * w
    layout = window_layout(h, w, window, shift, CPU)
    flat = layout.token_ids.flatten()
    counts = (flat + 1).bincount(minlength=n + 1)
    assert counts.numel() == n + 1
    assert (counts[1:] == 1).all()
    padded = (h + -h % window) * (w + -w % window)
    assert int(counts[0]) == padded - n
    assert layout.has_padding == (padded > n)
    assert torch.equal(flat[layout.slot_ids], torch.arange(n))


@given(geometries())
def test_map_units_are_the_tokens(geometry):
    h, w, *_ = geometry
    units = map_units(h, w, CPU)
    assert units.token_ids.shape == (1, h * w, 1)
    assert torch.equal(units.token_ids.flatten(), torch.arange(h * w))
    assert units.valid == (h * w,)
    assert units.num_tokens == h * w
    assert units.in_order
    assert not units.padded


@given(geometries(), st.booleans())
def test_window_units(geometry, whole):
    h, w, window, shift = geometry
    n = h * w
    found = window_units(h, w, window, shift, whole, CPU)
    ids, _ = naive_windows(h, w, window, shift)
    groups, units, size = found.token_ids.shape
    if whole:
        assert (groups, units, size) == (1, len(ids), window * window)
        tables = found.token_ids[0]
        valid = ((ids >= 0).any(1).sum().item(),)
    else:
        assert (groups, units, size) == (len(ids), window * window, 1)
        tables = found.token_ids[:, :, 0]
        valid = tuple((tables >= 0).sum(1).tolist())
    assert sorted_rows(tables) == sorted_rows(ids)
    assert found.valid == valid
    assert found.num_tokens == n
    assert not found.in_order
    # Of single tokens padding is never chosen; of whole windows it comes along.
    assert found.padded == (whole and bool((ids < 0).any()))
    assert sum(valid) == (len(ids) if whole else n), 'every window holds a token'


def test_equal_sizes_share_their_tables_and_others_do_not():
    first = window_layout(9, 11, 4, 2, CPU)
    assert window_layout(9, 11, 4, 2, CPU).token_ids is first.token_ids
    assert window_layout(11, 9, 4, 2, CPU).token_ids is not first.token_ids
    assert not torch.equal(window_layout(9, 11, 4, 0, CPU).token_ids, first.token_ids)


def test_tables_built_under_inference_mode_serve_training():
    with torch.inference_mode():
        layout = window_layout(13, 17, 5, 2, CPU)
        units = window_units(13, 17, 5, 2, True, CPU)
    for table in (layout.token_ids, layout.slot_ids, layout.regions, units.token_ids):
        assert not table.is_inference()
