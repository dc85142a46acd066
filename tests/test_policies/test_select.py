"""The best units of every group are active, whatever backend chooses them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlevit_mm.kernels import use_backend
from idlevit_mm.ops import map_units, row_mask, window_units
from idlevit_mm.policies.select import best_places, num_active, select_units, unit_scores

CPU = torch.device('cpu')
settings.register_profile('select', deadline=None, max_examples=60, derandomize=True)
settings.load_profile('select')


@st.composite
def problems(draw):
    """Random scores (B, N) with ties, units of any scope, and a ratio."""
    h, w = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    window = draw(st.integers(1, 5))
    shift = draw(st.sampled_from((0, window // 2)))
    scope = draw(st.sampled_from(('map', 'window_tokens', 'windows')))
    if scope == 'map':
        units = map_units(h, w, CPU)
    else:
        units = window_units(h, w, window, shift, scope == 'windows', CPU)
    keep = draw(st.sampled_from((1e-9, 0.1, 0.3, 0.5, 0.7, 0.95, 0.999)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch = draw(st.integers(1, 3))
    scores = torch.randn(batch, h * w, generator=generator)
    if draw(st.booleans()):
        scores = scores.round()
    return scores, units, keep


def choose(scores, units, keep):
    return select_units(unit_scores(scores, units), units, keep)


def mean_scores(scores, units):
    """Mean over the tokens of each unit (B, G, U), minus infinity without any."""
    result = torch.full((len(scores), *units.token_ids.shape[:2]), float('-inf'))
    for g, group in enumerate(units.token_ids.tolist()):
        for u, tokens in enumerate(group):
            tokens = [t for t in tokens if t >= 0]
            if tokens:
                result[:, g, u] = scores[:, tokens].mean(1)
    return result


@given(problems())
def test_score_of_a_unit_is_the_mean_of_its_tokens(problem):
    scores, units, _ = problem
    torch.testing.assert_close(unit_scores(scores, units), mean_scores(scores, units))


@given(problems())
def test_score_of_a_unit_may_be_the_norm_of_its_tokens(problem):
    scores, units, _ = problem
    want = mean_scores(scores.square(), units)
    if not units.in_order and units.token_ids.shape[2] > 1:
        count = (units.token_ids >= 0).sum(-1)
        want = torch.where(count > 0, (want * count).sqrt(), want)
        torch.testing.assert_close(unit_scores(scores, units, 'l2'), want)


def test_number_of_active_units():
    assert num_active(0.5, 7) == round(3.5)
    assert num_active(0.7, 10) == 7
    assert num_active(1e-12, 100) == 1
    assert num_active(1.0, 13) == 13
    assert num_active(0.3, 1) == 1
    assert [num_active(0.45, 9, rounding) for rounding in ('floor', 'ceil')] == [4, 5]


@given(problems())
def test_best_units_of_every_group_are_chosen(problem):
    scores, units, keep = problem
    tables = units.token_ids
    groups, number, size = tables.shape
    chosen = choose(scores, units, keep)
    ranked = mean_scores(scores, units)
    counts = [max(1, round(keep * valid)) for valid in units.valid]
    assert chosen.ids.shape == (len(scores), sum(counts) * size)
    assert (chosen.windows is not None) == (size > 1)
    place = {tuple(tokens): u for u, tokens in enumerate(tables.flatten(0, 1).tolist())}
    holds_token = (tables >= 0).any(-1)
    for b in range(len(scores)):
        # Padding of its own has no number: tokens of a window that is all padding look alike.
        own = chosen.ids[b].unflatten(0, (-1, size))
        assert (own >= 0).any(-1).all(), 'padding is active'
        picked = torch.tensor([place[tuple(tokens)] for tokens in own.tolist()])
        assert (picked.diff() > 0).all(), 'sorted and without repetition'
        if size > 1:
            assert torch.equal(chosen.windows[b], picked)
        for g, count in enumerate(counts):
            mine = picked[picked // number == g] % number
            assert len(mine) == count
            others = torch.ones(number, dtype=torch.bool).index_fill(0, mine, False)
            others &= holds_token[g]
            if others.any():
                assert ranked[b, g][mine].min() >= ranked[b, g][others].max() - 1e-6
    assert chosen.padded or (chosen.ids >= 0).all()


@given(problems())
def test_mask_marks_the_active_tokens(problem):
    scores, units, keep = problem
    chosen = choose(scores, units, keep)
    mask = row_mask(chosen, units.num_tokens)
    assert mask.shape == scores.shape
    for b in range(len(scores)):
        active = chosen.ids[b]
        active = active[active >= 0]
        assert active.unique().numel() == active.numel(), 'a token is taken twice'
        assert torch.equal(mask[b].nonzero().flatten(), active.sort().values)


@given(problems())
def test_choice_is_deterministic_by_image_and_by_every_backend(problem):
    """Ties are broken the same way each time, whatever else is in the batch."""
    scores, units, keep = problem
    chosen = choose(scores, units, keep)
    assert torch.equal(choose(scores.clone(), units, keep).ids, chosen.ids)
    with use_backend('reference'):
        assert torch.equal(choose(scores, units, keep).ids, chosen.ids)
    for b in range(len(scores)):
        alone = choose(scores[b : b + 1], units, keep)
        assert torch.equal(alone.ids[0], chosen.ids[b])


@given(problems())
def test_best_places_are_the_highest_ascending(problem):
    scores, _, keep = problem
    count = num_active(keep, scores.shape[1])
    places = best_places(scores, count)
    assert places.shape == (len(scores), count)
    assert (places.diff(dim=1) > 0).all()
    torch.testing.assert_close(
        scores.gather(1, places).sort(dim=1, descending=True).values, scores.topk(count).values
    )
