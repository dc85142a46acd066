"""Images of different sizes in one batch: what is padding, and that it never competes."""

import pytest
import torch
from backbone_zoo import BY_NAME, image
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_cases import CASE_FAMILIES, CASES, OWN, SCOPES, each
from torch import Tensor

from idlevit_mm.layers import SelfAttention
from idlevit_mm.ops import extent_of, filled_sizes, map_units, units_inside, window_units
from idlevit_mm.policies import Seen
from idlevit_mm.policies.select import select_units, unit_scores
from idlevit_mm.registry import SCORERS, build_from

CPU, TOKENS = torch.device('cpu'), torch.zeros(1, dtype=torch.float64)
QUICK = settings(deadline=None, max_examples=60, derandomize=True)
SIDES = st.integers(1, 11)


def padded(sizes, whole, value=0.0, channels=3):
    """Noise of each size in a batch of one size, padded at the bottom and right."""
    batch = torch.full((len(sizes), channels, *whole), value, dtype=torch.float64)
    for one, (height, width) in zip(batch, sizes, strict=True):
        one[:, :height, :width] = torch.rand(channels, height, width, dtype=torch.float64) + 0.1
    return batch


@QUICK
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), SIDES, SIDES, st.data())
def test_sizes_are_found_by_any_padding(sizes, more_rows, more_cols, data):
    whole = tuple(max(axis) for axis in zip(*sizes, (more_rows, more_cols), strict=True))
    value = data.draw(st.sampled_from([0.0, -2.1179, 0.05]))
    found = filled_sizes(padded(sizes, whole, value))
    # A single pixel is no evidence.
    expected = [whole if whole[0] * whole[1] - h * w == 1 else (h, w) for h, w in sizes]
    assert (found or (whole,) * len(sizes)) == tuple(expected)


def test_an_image_of_one_value_is_whole():
    batch = padded([(3, 4), (5, 5)], (5, 6))
    batch[0] = 0.7
    assert filled_sizes(batch) == ((5, 6), (5, 5))
    assert filled_sizes(torch.zeros(2, 3, 4, 5)) is None
    assert filled_sizes(torch.rand(2, 3, 1, 1)) is None


@pytest.mark.parametrize('stride', [1, 4, 16])
def test_a_token_that_holds_a_pixel_of_the_image_belongs_to_it(stride):
    hw, pixels = (5, 7), ((1, 7 * stride), (2 * stride + 1, 3 * stride), (5 * stride, 1))
    extent = extent_of(pixels, stride, hw, TOKENS)
    grid = torch.zeros(3, 5 * stride, 7 * stride)
    for one, (height, width) in zip(grid, pixels, strict=True):
        one[:height, :width] = 1
    held = torch.nn.functional.max_pool2d(grid, stride, stride)
    assert torch.equal(extent.inside, held.flatten(1) > 0)
    assert extent_of(((5 * stride, 7 * stride),) * 2, stride, hw, TOKENS) is None


@pytest.mark.parametrize(('window', 'shift'), [(4, 0), (3, 1), (20, 10), (1, 0)])
@pytest.mark.parametrize('scope', ['map', 'window_tokens', 'windows'])
@QUICK
@example([(1, 1), (6, 9)], 0.5)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3),
    st.sampled_from([0.3, 0.5, 1.0]),
)
def test_padding_is_chosen_last_and_not_counted(scope, window, shift, sizes, keep):
    hw = (6, 9)
    extent = extent_of(tuple(sizes), 1, hw, TOKENS)
    if extent is None:
        return
    units = map_units(*hw, CPU)
    if scope != 'map':
        units = window_units(*hw, window, shift, scope == 'windows', CPU)
    units = units_inside(units, hw, extent)
    # Padding has the highest scores.
    scores = torch.rand(len(sizes), 54).masked_fill(~extent.inside, 9.0)
    rows = select_units(unit_scores(scores, units), units, keep)
    assert rows.padded or (rows.ids >= 0).all()
    for image_ids, inside in zip(rows.ids, extent.inside, strict=True):
        kept = set(image_ids[image_ids >= 0].tolist())
        for group in units.token_ids:
            members = [[t for t in unit.tolist() if t >= 0] for unit in group]
            real = [unit for unit in members if any(inside[t] for t in unit)]
            chosen = [unit for unit in members if unit and kept.issuperset(unit)]
            if any(unit not in real for unit in chosen):
                assert all(unit in chosen for unit in real)
    # By hand: the largest share of any image.
    groups = [[[t for t in unit.tolist() if t >= 0] for unit in g] for g in units.token_ids]
    for number, group in enumerate(groups):
        most = max(sum(any(inside[t] for t in unit) for unit in group) for inside in extent.inside)
        assert units.valid[number] == most


@pytest.mark.parametrize('name', [n for n in SCORERS.module_dict if not n.startswith('class_')])
def test_scores_of_an_image_do_not_see_its_padding(name):
    """Those of the part that is filled are those of that part alone."""
    if name in ('random', 'uniform_grid'):
        pytest.skip('it does not look at tokens')
    hw, sizes = (5, 7), ((3, 4), (5, 2), (1, 7))
    extent = extent_of(sizes, 1, hw, TOKENS)
    tokens = torch.randn(3, 35, 8, dtype=torch.float64)
    scorer = build_from(SCORERS, 'scorer', name, embed_dims=8).double()
    attention = SelfAttention(8, 2).double()

    def scores(tokens: Tensor, hw, extent=None):
        queries = attention.mean_query_attention(tokens, hw, extent)
        return scorer(Seen(tokens, hw, queries, None, extent))

    with torch.no_grad():
        found = scores(tokens, hw, extent)
        for index, (height, width) in enumerate(sizes):
            part = tokens[index].unflatten(0, hw)[:height, :width].reshape(1, -1, 8)
            alone = scores(part, (height, width))
            torch.testing.assert_close(found[index, extent.inside[index]], alone[0])


# Windows of a shifted map lie otherwise on a larger one, and a share is rounded in each.
@each(c for c in [*SCOPES, *OWN, *CASES[:8]] if c.policy.get('scope') != 'window_tokens')
@torch.no_grad()
def test_a_neighbour_never_takes_tokens(case):
    """In every block an image has as many active tokens beside a larger one as alone, or more."""
    model, small, large = case.build().double(), (40, 57), (97, 131)
    batch = padded([small, large], large)
    own = batch[:1, :, : small[0], : small[1]]
    model(own)
    alone = model.keep_masks
    model(batch)
    for together, single in zip(model.keep_masks, alone, strict=True):
        for beside, mask in zip(together, single, strict=True):
            height, width = mask.shape[1:]
            assert beside[0, :height, :width].sum() >= mask.sum()


@pytest.mark.parametrize('name', CASE_FAMILIES)
@torch.no_grad()
def test_padding_alone_changes_no_choice(name):
    """One image padded to a multiple: as many are active as without padding."""
    variant = BY_NAME[name]
    model = variant.build(keep_ratios=0.5).double().eval()
    whole, size = (64, 96), (52, 67)
    batch = padded([size], whole)
    model(batch)
    first = model.keep_masks[0][0]
    height, width = (-(-side // model.strides[0]) for side in size)
    assert first.sum() == round(0.5 * height * width)
    assert not first[:, height:].any()
    assert not first[:, :, width:].any()
    # Said instead of found, and where all is filled.
    batch[:] = torch.rand_like(batch)
    model(batch)
    assert model.keep_masks[0][0].sum() == round(0.5 * first.numel())
    model(batch, img_shapes=[(*size, 3)])
    assert model.keep_masks[0][0].sum() == round(0.5 * height * width)


@pytest.mark.parametrize('shapes', [[(9, 9)], [(0, 9), (9, 9)], [(9, 9), (9, 98)]])
def test_shapes_of_another_batch_are_refused(shapes):
    model = BY_NAME['swin'].build(keep_ratios=0.5)
    with pytest.raises(ValueError, match=r'img_shapes=.* must be 2 sizes from 1x1 to 32x48 pixels'):
        model(image((2, 3, 32, 48)), img_shapes=shapes)
