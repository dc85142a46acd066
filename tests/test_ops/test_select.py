"""Top-k, gather and scatter of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlevit_mm.ops import (
    keep_mask,
    map_units,
    num_active,
    put_tokens,
    select_units,
    take_tokens,
    unit_scores,
    window_units,
)

CPU = torch.device('cpu')
settings.register_profile('ops', deadline=None, max_examples=60, derandomize=True)
settings.load_profile('ops')


@st.composite
def problems(draw):
    """Random scores (B, N) with ties, a layout of any scope, and a ratio."""
    h, w = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    window = draw(st.integers(1, 5))
    shift = draw(st.sampled_from((0, window // 2)))
    scope = draw(st.sampled_from(('map', 'window_tokens', 'windows')))
    if scope == 'map':
        layout = map_units(h, w, CPU)
    else:
        layout = window_units(h, w, window, shift, scope == 'windows', CPU)
    keep = draw(st.sampled_from((1e-9, 0.1, 0.3, 0.5, 0.7, 0.95, 0.999)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch = draw(st.integers(1, 3))
    scores = torch.randn(batch, h * w, generator=generator)
    if draw(st.booleans()):
        scores = scores.round()
    return scores, layout, keep


def choose(scores, layout, keep):
    return select_units(unit_scores(scores, layout), layout, keep)


def mean_scores(scores, layout):
    """Mean over the tokens of each unit (B, G, U), minus infinity without any."""
    result = torch.full((len(scores), *layout.token_ids.shape[:2]), float('-inf'))
    for g, group in enumerate(layout.token_ids.tolist()):
        for u, tokens in enumerate(group):
            tokens = [t for t in tokens if t < layout.num_tokens]
            if tokens:
                result[:, g, u] = scores[:, tokens].mean(1)
    return result


@given(problems())
def test_score_of_a_unit_is_the_mean_of_its_tokens(problem):
    scores, layout, _ = problem
    torch.testing.assert_close(unit_scores(scores, layout), mean_scores(scores, layout))


def test_number_of_active_units():
    assert num_active(0.5, 7) == round(3.5)
    assert num_active(0.7, 10) == 7
    assert num_active(1e-12, 100) == 1
    assert num_active(1.0, 13) == 13
    assert num_active(0.3, 1) == 1


@given(problems())
def test_best_units_of_every_group_are_chosen(problem):
    scores, layout, keep = problem
    n = layout.num_tokens
    groups, units, _ = layout.token_ids.shape
    chosen = choose(scores, layout, keep)
    ranked = mean_scores(scores, layout)
    counts = [max(1, round(keep * valid)) for valid in layout.valid_units]
    assert chosen.unit_ids.shape == (len(scores), sum(counts))
    holds_token = (layout.token_ids < n).any(-1)
    for b in range(len(scores)):
        picked = chosen.unit_ids[b]
        assert (picked.diff() > 0).all(), 'sorted and without repetition'
        for g, count in enumerate(counts):
            mine = picked[picked // units == g] % units
            assert len(mine) == count
            assert holds_token[g][mine].all(), 'padding is active'
            others = torch.ones(units, dtype=torch.bool).index_fill(0, mine, False) & holds_token[g]
            if others.any():
                assert ranked[b, g][mine].min() >= ranked[b, g][others].max() - 1e-6


@given(problems())
def test_token_ids_are_the_tokens_of_the_units(problem):
    scores, layout, keep = problem
    chosen = choose(scores, layout, keep)
    tables = layout.token_ids.flatten(0, 1)
    for b in range(len(scores)):
        assert torch.equal(chosen.token_ids[b], tables[chosen.unit_ids[b]].flatten())
    if not chosen.has_padding:
        assert (chosen.token_ids < layout.num_tokens).all()


@given(problems())
def test_mask_marks_the_active_tokens(problem):
    scores, layout, keep = problem
    chosen = choose(scores, layout, keep)
    n = layout.num_tokens
    mask = keep_mask(chosen, n)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    for b in range(len(scores)):
        active = chosen.token_ids[b]
        active = active[active < n]
        assert active.unique().numel() == active.numel(), 'a token is taken twice'
        assert torch.equal(mask[b].nonzero().flatten(), active.sort().values)


@given(problems())
def test_choice_is_deterministic_and_by_image(problem):
    """Ties are broken the same way each time, and whatever else is in the batch."""
    scores, layout, keep = problem
    chosen = choose(scores, layout, keep)
    assert torch.equal(choose(scores.clone(), layout, keep).token_ids, chosen.token_ids)
    for b in range(len(scores)):
        alone = choose(scores[b : b + 1], layout, keep)
        assert torch.equal(alone.token_ids[0], chosen.token_ids[b])


@given(problems(), st.integers(1, 4))
def test_put_undoes_take(problem, channels):
    scores, layout, keep = problem
    chosen = choose(scores, layout, keep)
    x = torch.randn(*scores.shape, channels)
    taken = take_tokens(x, chosen)
    assert taken.shape == (*chosen.token_ids.shape, channels)
    real = chosen.token_ids < layout.num_tokens
    for b in range(len(scores)):
        assert torch.equal(taken[b][real[b]], x[b][chosen.token_ids[b][real[b]]])
    assert torch.equal(put_tokens(x, chosen, taken), x)


@given(problems())
def test_put_replaces_the_active_rows_alone(problem):
    scores, layout, keep = problem
    chosen = choose(scores, layout, keep)
    x = torch.randn(*scores.shape, 3)
    before = x.clone()
    values = torch.randn(*chosen.token_ids.shape, 3)
    out = put_tokens(x, chosen, values)
    mask = keep_mask(chosen, layout.num_tokens)
    assert torch.equal(x, before), 'the input was written to'
    assert torch.equal(out[~mask], x[~mask])
    assert torch.equal(take_tokens(out, chosen)[real(chosen, layout)], values[real(chosen, layout)])


def real(chosen, layout):
    return chosen.token_ids < layout.num_tokens


@given(problems())
@settings(max_examples=20)
def test_gradients_of_take_and_put(problem):
    """Each equals plain indexing, gradients included."""
    scores, layout, keep = problem
    chosen = choose(scores, layout, keep)
    ids, slots = chosen.token_ids, real(chosen, layout)
    batch = torch.arange(len(scores))[:, None].expand_as(ids)
    x = torch.randn(*scores.shape, 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(*ids.shape, 2, dtype=torch.float64, requires_grad=True)
    weight_take = torch.randn(*ids.shape, 2, dtype=torch.float64) * slots[..., None]
    weight_put = torch.randn_like(x)

    def grads(take, put):
        # What stands in padding slots is unspecified: only real slots enter the result.
        picked = torch.where(slots[..., None], take, 0.0)
        loss = (picked * weight_take).sum() + (put.square() * weight_put).sum()
        return torch.autograd.grad(loss, (x, values))

    plain_take = torch.zeros_like(values)
    plain_take = plain_take.index_put((slots.nonzero(as_tuple=True)), x[batch[slots], ids[slots]])
    plain_put = x.index_put((batch[slots], ids[slots]), values[slots])
    want = grads(plain_take, plain_put)
    got = grads(take_tokens(x, chosen), put_tokens(x, chosen, values))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('scope', ['windows', 'window_tokens'])
def test_padding_is_never_active_even_if_tokens_score_lowest(scope):
    """A map of one token in a window of 49 slots."""
    layout = window_units(1, 1, 7, 3, scope == 'windows', CPU)
    chosen = choose(torch.tensor([[-1e30]]), layout, 0.5)
    assert keep_mask(chosen, 1).tolist() == [[True]]


def test_score_of_a_window_ignores_padding():
    """One bright token alone in its window beats a window full of dimmer ones."""
    layout = window_units(1, 5, 4, 0, True, CPU)
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0]])
    chosen = choose(scores, layout, 0.5)
    assert keep_mask(chosen, 5).tolist() == [[False] * 4 + [True]]
