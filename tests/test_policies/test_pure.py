"""Policies and scorers on plain tensors, without any network: who is kept, who weighs what."""

import inspect
import math
from itertools import product
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from idlevit_mm.ops import Extent, Rows, Units, map_units, row_mask, window_units
from idlevit_mm.policies import (
    EVERYTHING,
    Learned,
    Plan,
    Policy,
    Regroup,
    Scorer,
    Seen,
    build_policy,
)
from idlevit_mm.policies.policy import positive
from idlevit_mm.policies.select import num_active
from idlevit_mm.registry import POLICIES, SCORERS, build_from

CPU = torch.device('cpu')
SCOPES = ('map', 'window_tokens', 'windows')
QUICK = settings(deadline=None, max_examples=40, derandomize=True)
TINY = torch.finfo(torch.float32).tiny


def policy_of(name, class_token=False, **options):
    return build_policy(dict(type=name, **options), 4, SCOPES, class_token)


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def line(count):
    """Units of a map of one row."""
    return map_units(1, count, CPU)


def ids_of(plan):
    return plan.rows.ids.tolist()


def assert_plan(plan, ids, summary=None, **others):
    """The plan computes these rows, with these weights, and is else the default but for others."""
    assert ids_of(plan) == ids
    assert plan.rows.windows is None
    assert not plan.rows.padded
    if summary is None:
        assert plan.summary is None
    else:
        assert torch.equal(plan.summary, torch.tensor(summary, dtype=plan.summary.dtype))
    fields = {name: getattr(plan, name) for name in ('keys', 'spread', 'gate', 'ask', 'hold')}
    assert fields == dict(keys='rows', spread=False, gate=None, ask=False, hold=False) | others


# --- what all have in common -----------------------------------------------------------------


ALL = ('IdleViT', 'EViT', 'EvoViT', 'SparseViT')


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('class_token', [False, True])
def test_ratio_of_one_is_everything_and_needs_no_scores(name, class_token):
    policy = policy_of(name, class_token)
    assert not policy.wants_scores(1.0, None)
    plan, state = policy.plan(None, line(6), 1.0, EVERYTHING, None)
    asks = name == 'EvoViT' and class_token
    assert plan == Plan(ask=asks)
    assert state is None


@pytest.mark.parametrize(
    ('name', 'class_token', 'wants'),
    [
        ('IdleViT', False, True),
        ('IdleViT', True, True),
        ('EViT', False, True),
        ('EViT', True, False),
        ('EvoViT', False, True),
        ('EvoViT', True, False),
        ('SparseViT', False, True),
    ],
)
def test_scores_are_wanted_where_attention_does_not_rank(name, class_token, wants):
    policy = policy_of(name, class_token)
    for ratio in (0.999, 1e-6):
        assert policy.wants_scores(ratio, None) == wants


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('IdleViT', {}),
        ('IdleViT', dict(context='summary')),
        ('EViT', {}),
        ('EvoViT', {}),
        ('SparseViT', {}),
    ],
)
def test_images_of_a_batch_do_not_meet(name, options):
    """Two images together are planned as each alone, over three blocks."""
    policy = policy_of(name, **options)
    units = window_units(4, 6, 2, 0, True, CPU) if name == 'SparseViT' else map_units(4, 6, CPU)
    batch = torch.rand(3, 2, 24)
    walks = []
    for scores in (batch, batch[:, :1], batch[:, 1:]):
        last, state, plans = EVERYTHING, None, []
        for step, ratio in enumerate((0.8, 0.6, 0.5)):
            given = scores[step] if policy.wants_scores(ratio, state) else None
            last, state = policy.plan(given, units, ratio, last, state)
            plans.append(last)
        walks.append(plans)
    for both, *each in zip(*walks, strict=True):
        assert torch.equal(both.rows.ids, torch.cat([one.rows.ids for one in each]))
        if both.summary is not None:
            assert torch.equal(both.summary, torch.cat([one.summary for one in each]))


def test_nothing_that_is_handed_to_a_policy_is_written_to():
    for name in ('IdleViT', 'EViT', 'EvoViT', 'SparseViT'):
        policy = policy_of(name)
        units = window_units(2, 4, 2, 0, True, CPU) if name == 'SparseViT' else map_units(2, 4, CPU)
        scores, other = torch.randn(2, 8), torch.randn(2, 8)
        before = scores.clone(), other.clone()
        last, state = policy.plan(scores, units, 0.7, EVERYTHING, None)
        kept = last.rows.ids.clone(), None if state is None else state.clone()
        policy.plan(other, units, 0.5, last, state)
        assert torch.equal(scores, before[0])
        assert torch.equal(other, before[1])
        assert torch.equal(last.rows.ids, kept[0])
        assert state is None or torch.equal(state, kept[1])


def own(registry, base):
    found = [cls for cls in registry.module_dict.values() if cls.__module__.startswith('idlevit')]
    assert found
    assert all(issubclass(cls, base) for cls in found)
    return [base, *found]


def test_policies_and_scorers_never_receive_a_block():
    """They get numbers: tensors, ratios, units, plans, and what they have returned before."""
    numbers = Tensor | None
    kinds = dict(
        scores=numbers, attention=Tensor, units=Units, keep_ratio=float, last=Plan, plan=Plan
    )
    for cls in own(POLICIES, Policy):
        for method, names in (
            ('plan', ['scores', 'units', 'keep_ratio', 'last', 'state']),
            ('between', ['attention', 'plan', 'keep_ratio', 'state']),
            ('wants_scores', ['keep_ratio', 'state']),
        ):
            function = getattr(cls, method)
            assert list(inspect.signature(function).parameters) == ['self', *names], cls
            hints = get_type_hints(function)
            for name in names:
                allowed = (kinds[name],) if name in kinds else (Any, numbers)
                assert hints[name] in allowed, f'{cls.__name__}.{method}: {name}'
    for cls in own(SCORERS, Scorer):
        assert list(inspect.signature(cls.forward).parameters) == ['self', 'seen'], cls
        assert get_type_hints(cls.forward)['seen'] is Seen, cls
    assert set(get_type_hints(Seen).values()) == {Tensor, numbers, tuple[int, int], Extent | None}


def test_a_policy_holds_no_state_of_its_own():
    for name in ALL:
        policy = policy_of(name)
        before = dict(vars(policy))
        units = window_units(2, 4, 2, 0, True, CPU) if name == 'SparseViT' else map_units(2, 4, CPU)
        policy.plan(torch.rand(1, 8), units, 0.5, EVERYTHING, None)
        assert vars(policy) == before


# --- IdleViT ---------------------------------------------------------------------------------

FIVE = row(0.1, 0.5, -0.2, 0.4, 0.0)


@pytest.mark.parametrize(
    ('ratio', 'rounding', 'ids'),
    [
        (0.5, 'nearest', [1, 3]),
        (0.5, 'floor', [1, 3]),
        (0.5, 'ceil', [0, 1, 3]),
        (0.7, 'nearest', [0, 1, 3, 4]),
        (0.7, 'floor', [0, 1, 3]),
        (1e-9, 'floor', [1]),
        (0.9999, 'nearest', [0, 1, 2, 3, 4]),
    ],
)
def test_idlevit_keeps_the_best(ratio, rounding, ids):
    plan, state = policy_of('IdleViT', rounding=rounding).plan(
        FIVE, line(5), ratio, EVERYTHING, None
    )
    assert_plan(plan, [ids])
    assert state is None


def test_idlevit_does_not_look_back():
    policy = policy_of('IdleViT')
    last = Plan(Rows(torch.tensor([[2, 4]])), summary=row(1, 1, 0, 1, 0), hold=True, ask=True)
    assert_plan(policy.plan(FIVE, line(5), 0.4, last, None)[0], [[1, 3]])
    assert policy.plan(None, line(5), 1.0, last, None) == (EVERYTHING, None)


@pytest.mark.parametrize('context', ['active', 'summary', 'all'])
def test_contexts_of_idlevit(context):
    plan, _ = policy_of('IdleViT', context=context).plan(FIVE, line(5), 0.4, EVERYTHING, None)
    summary = None
    if context == 'summary':
        # Negative scores, and exact zeros, count next to nothing.
        summary = [[0.1, 0.0, TINY, 0.0, TINY]]
    assert_plan(plan, [[1, 3]], summary, keys='all' if context == 'all' else 'rows')


def test_no_summary_of_no_token():
    plan, _ = policy_of('IdleViT', context='summary').plan(FIVE, line(5), 0.99, EVERYTHING, None)
    assert_plan(plan, [[0, 1, 2, 3, 4]])


def test_idlevit_chooses_in_each_window():
    """Two windows side by side: the best of each, though all of one are worse."""
    units = window_units(2, 4, 2, 0, False, CPU)
    scores = row(1, 2, 11, 12, 3, 4, 13, 14)
    plan, _ = policy_of('IdleViT', scope='window_tokens').plan(scores, units, 0.5, EVERYTHING, None)
    assert_plan(plan, [[4, 5, 6, 7]])


def test_idlevit_ranks_windows_by_their_mean():
    units = window_units(3, 2, 2, 0, True, CPU)  # the second window is two tokens and two paddings
    scores = row(5, 0, 0, 0, 2, 3)  # means 1.25 and 2.5
    plan, _ = policy_of('IdleViT', scope='windows').plan(scores, units, 0.5, EVERYTHING, None)
    assert ids_of(plan) == [[4, 5, -1, -1]]
    assert plan.rows.windows.tolist() == [[1]]
    assert plan.rows.padded


# --- EViT ------------------------------------------------------------------------------------


def test_evit_takes_tokens_out_for_good():
    policy = policy_of('EViT')
    first, state = policy.plan(row(5, 1, 4, 2, 3), line(5), 0.5, EVERYTHING, None)
    assert state is None
    # Rounded up; who left has the score it left with, and rows with a new summary are not held.
    assert_plan(first, [[0, 2, 4]], [[0, 1, 0, 2, 0]])
    second, _ = policy.plan(row(1, 9, 7, 9, 8), line(5), 0.5, first, None)
    assert_plan(second, [[2, 4]], [[1, 1, 0, 2, 0]])
    # Where none leaves, the plan in force goes on.
    third, _ = policy.plan(None, line(5), 1.0, second, None)
    assert_plan(third, [[2, 4]], [[1, 1, 0, 2, 0]])
    assert third.rows.ids is second.rows.ids
    assert third.summary is second.summary


def test_evit_without_fused_token_holds_its_rows():
    policy = policy_of('EViT', fuse=False)
    first, _ = policy.plan(row(5, 1, 4, 2, 3), line(5), 0.5, EVERYTHING, None)
    assert_plan(first, [[0, 2, 4]], hold=True)
    later, _ = policy.plan(None, line(5), 1.0, first, None)
    assert_plan(later, [[0, 2, 4]], hold=True)
    assert later.rows.ids is first.rows.ids


def test_evit_has_no_fused_token_while_all_are_in_play():
    plan, _ = policy_of('EViT').plan(row(1, 2, 3), line(3), 0.99, EVERYTHING, None)
    assert_plan(plan, [[0, 1, 2]], hold=True)


def test_scores_that_are_no_weights_count_next_to_nothing():
    plan, _ = policy_of('EViT').plan(row(5, -1, 4, 0), line(4), 0.5, EVERYTHING, None)
    assert_plan(plan, [[0, 2]], [[0, TINY, 0, TINY]])


@pytest.mark.parametrize('fuse', [True, False])
def test_evit_by_class_attention_decides_between_the_halves(fuse):
    policy = policy_of('EViT', class_token=True, fuse=fuse)
    plan, state = policy.plan(None, line(5), 0.5, EVERYTHING, None)
    assert plan == Plan(ask=True)
    regroup, state = policy.between(row(0.3, 0.05, 0.2, 0.1, 0.25), plan, 0.5, state)
    assert state is None
    assert isinstance(regroup, Regroup)
    assert regroup.keep.tolist() == [[0, 2, 4]]
    if fuse:
        # What the class token paid to those that leave, as it is.
        assert torch.equal(regroup.fuse, row(0, 0.05, 0, 0.1, 0))
    else:
        assert regroup.fuse is None
    # Places are those among the rows in play, of which an appended one is the last.
    last = Plan(Rows(torch.tensor([[0, 2, 4, 6]])), hold=True)
    plan, _ = policy.plan(None, line(5), 0.5, last, None)
    assert_plan(plan, [[0, 2, 4, 6]], ask=True, hold=True)
    regroup, _ = policy.between(row(0.1, 0.2, 0.3, 0.4), plan, 0.5, None)
    assert regroup.keep.tolist() == [[2, 3]]
    if fuse:
        assert torch.equal(regroup.fuse, row(0.1, 0.2, 0, 0))
    # A dense block goes on with them and asks for nothing.
    plan, _ = policy.plan(None, line(5), 1.0, plan, None)
    assert_plan(plan, [[0, 2, 4, 6]], hold=True)


def test_evit_fuses_nothing_where_none_leaves():
    policy = policy_of('EViT', class_token=True)
    regroup, _ = policy.between(row(0.2, 0.3, 0.5), Plan(ask=True), 0.9, None)
    assert regroup.keep.tolist() == [[0, 1, 2]]
    assert regroup.fuse is None


@QUICK
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.lists(st.sampled_from([1.0, 0.95, 0.7, 0.5, 0.01]), min_size=1, max_size=6),
    st.sampled_from(['floor', 'nearest', 'ceil']),
    st.integers(0, 999),
)
def test_evit_keeps_its_books(height, width, ratios, rounding, seed):
    """Tokens in play and weights of the others part the map, whatever the ratios."""
    policy = policy_of('EViT', rounding=rounding)
    tokens, units = height * width, map_units(height, width, CPU)
    generator = torch.Generator().manual_seed(seed)
    plan, state, in_play, weights = EVERYTHING, None, set(range(tokens)), {}
    for ratio in ratios:
        scores = torch.randn(tokens, generator=generator)
        given = scores[None] if policy.wants_scores(ratio, state) else None
        plan, state = policy.plan(given, units, ratio, plan, state)
        if ratio < 1.0:
            count = num_active(ratio, len(in_play), rounding)
            stays = set(sorted(in_play, key=lambda t: -float(scores[t]))[:count])
            weights |= {t: max(float(scores[t]), 1e-37) for t in in_play - stays}
            in_play = stays
        got = plan.rows and set(plan.rows.ids[0].tolist())
        assert in_play == (set(range(tokens)) if got is None else got)
        if weights:
            for token in range(tokens):
                assert float(plan.summary[0, token]) == pytest.approx(weights.get(token, 0.0))
        else:
            assert plan.summary is None


# --- Evo-ViT ---------------------------------------------------------------------------------


def test_evovit_needs_attention_before_it_can_choose():
    policy = policy_of('EvoViT', class_token=True)
    plan, state = policy.plan(None, line(4), 1.0, EVERYTHING, None)
    assert (plan, state) == (Plan(ask=True), None)
    regroup, state = policy.between(row(0.4, 0.1, 0.2, 0.3), plan, 1.0, state)
    assert regroup is None
    assert torch.equal(state, row(0.4, 0.1, 0.2, 0.3))
    plan, after = policy.plan(None, line(4), 0.5, plan, state)
    assert_plan(plan, [[0, 3]], [[0, 0.1, 0.2, 0]], spread=True, ask=True)
    assert after is state
    # Only the informative ones move, by half.
    regroup, state = policy.between(row(0.2, 0.6), plan, 0.5, state)
    assert regroup is None
    torch.testing.assert_close(state, row(0.3, 0.1, 0.2, 0.45))


def test_evovit_passing_has_no_representative():
    policy = policy_of('EvoViT', class_token=True, representative=False)
    plan, _ = policy.plan(None, line(4), 0.5, EVERYTHING, row(0.4, 0.1, 0.2, 0.3))
    assert_plan(plan, [[0, 3]], ask=True)


def test_no_representative_of_no_token():
    plan, _ = policy_of('EvoViT').plan(row(1, 2, 3), line(3), 0.99, EVERYTHING, None)
    assert_plan(plan, [[0, 1, 2]])


@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0])
def test_running_attention_of_the_class_token(alpha):
    """Against a loop over tokens; dense blocks move all, the others the informative."""
    policy = policy_of('EvoViT', class_token=True, alpha=alpha)
    generator = torch.Generator().manual_seed(1)
    running, plan, state = [None] * 9, EVERYTHING, None
    for ratio in (1.0, 1.0, 0.6, 0.4, 1.0, 0.3):
        plan, state = policy.plan(None, line(9), ratio, plan, state)
        moves = range(9)
        if ratio < 1.0:
            order = sorted(range(9), key=lambda token: -running[token])
            moves = sorted(order[: round(9 * ratio)])
            want = [0.0 if t in moves else running[t] for t in range(9)]
            torch.testing.assert_close(plan.summary[0], torch.tensor(want))
            assert ids_of(plan) == [moves]
        else:
            assert plan == Plan(ask=True)
        attention = torch.rand(1, len(moves), generator=generator).softmax(-1)
        regroup, state = policy.between(attention, plan, ratio, state)
        assert regroup is None
        for token, paid in zip(moves, attention[0].tolist(), strict=True):
            old = running[token]
            running[token] = paid if old is None else (1 - alpha) * old + alpha * paid
        torch.testing.assert_close(state[0], torch.tensor(running))


@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0])
def test_running_scores_of_evovit(alpha):
    """g starts as the first scores over their sum; then only informative places move."""
    policy, running, state = policy_of('EvoViT', alpha=alpha), None, None
    for step in range(3):
        scores = torch.rand(2, 35, generator=torch.Generator().manual_seed(step))
        attention = scores / scores.sum(1, keepdim=True)
        running = attention if running is None else running
        plan, state = policy.plan(scores, line(35), 0.4, EVERYTHING, state)
        informative = torch.zeros(2, 35, dtype=torch.bool)
        informative.scatter_(1, running.topk(14).indices, True)
        assert torch.equal(row_mask(plan.rows, 35), informative)
        torch.testing.assert_close(plan.summary, torch.where(informative, 0.0, running))
        assert plan.spread
        assert not plan.ask
        moved = (1 - alpha) * running + alpha * attention
        running = torch.where(informative, moved, running)
        torch.testing.assert_close(state, running)
    untouched = policy.plan(None, line(35), 1.0, plan, state)
    assert untouched[0] == EVERYTHING
    assert untouched[1] is state


# --- SparseViT -------------------------------------------------------------------------------


def test_sparsevit_ranks_windows_by_their_norm_once():
    """Few strong tokens beat many of a higher mean; padding counts as nothing."""
    policy = policy_of('SparseViT')
    units = window_units(4, 8, 4, 0, True, CPU)
    scores = torch.zeros(1, 4, 8)
    scores[:, 0, :4] = 4.0  # mean 1, norm 8
    scores[:, :, 4:] = 1.1  # mean 1.1, norm 4.4
    scores[:, 3, 0] = 0.5  # no two shifted windows are alike
    scores = scores.flatten(1)
    plan, state = policy.plan(scores, units, 0.5, EVERYTHING, None)
    assert plan.rows.windows.tolist() == [[0]]
    assert sorted(ids_of(plan)[0]) == [8 * r + c for r in range(4) for c in range(4)]
    assert torch.equal(state, scores)
    # The scores of the first idle block serve all blocks, shifted windows too.
    assert not policy.wants_scores(0.5, state)
    shifted = window_units(4, 8, 4, 2, True, CPU)
    plan, after = policy.plan(None, shifted, 0.5, plan, state)
    assert after is state
    valid = [[t for t in unit if t >= 0] for unit in shifted.token_ids[0].tolist()]
    norms = [math.sqrt(sum(float(scores[0, t]) ** 2 for t in unit)) for unit in valid]
    best = sorted(range(len(norms)), key=lambda unit: -norms[unit])[: len(ids_of(plan)[0]) // 16]
    assert plan.rows.windows.tolist() == [sorted(best)]


def test_sparsevit_counts_padding_as_nothing():
    units = window_units(1, 5, 4, 0, True, CPU)
    scores = row(1, 1, 1, 1, 1.9)  # alone in its window: norm 1.9 against 2
    plan, _ = policy_of('SparseViT').plan(scores, units, 0.5, EVERYTHING, None)
    assert [t for t in ids_of(plan)[0] if t >= 0] == [0, 1, 2, 3]
    assert plan.rows.padded


def test_sparsevit_waits_for_its_first_idle_block():
    policy = policy_of('SparseViT')
    units = window_units(2, 4, 2, 0, True, CPU)
    plan, state = policy.plan(None, units, 1.0, EVERYTHING, None)
    assert (plan, state) == (EVERYTHING, None)
    assert policy.wants_scores(0.5, None)
    first = torch.rand(1, 8)
    plan, state = policy.plan(first, units, 0.5, plan, state)
    assert torch.equal(state, first)
    dense, kept = policy.plan(None, units, 1.0, plan, state)
    assert dense == EVERYTHING
    assert kept is state


def test_only_attention_policies_decide_between_the_halves():
    for name in ('IdleViT', 'SparseViT'):
        with pytest.raises(NotImplementedError, match=f'{name} chooses before attention'):
            policy_of(name).between(row(1, 2), EVERYTHING, 0.5, None)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_weights_are_positive(dtype):
    weights = positive(torch.tensor([-1.0, 0.0, 2.0], dtype=dtype))
    assert (weights > 0).all()
    assert weights.dtype == dtype
    assert weights[2] == 2


# --- scorers ---------------------------------------------------------------------------------


def scorer_of(name, **options):
    return build_policy(
        dict(type='IdleViT', scorer=dict(type=name, **options)), 4, SCOPES, True
    ).scorer


TOKENS = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-6.0, 0.0, 8.0, 2.0]]])


@pytest.mark.parametrize(
    ('name', 'more', 'want'),
    [
        ('activation_norm', {}, [7 / 4, 0.0, 16 / 4]),
        (
            'mean_distance',
            {},
            [  # the mean is (-1, 4/3, 8/3, 2/3)
                math.sqrt(16 + 64 / 9 + 64 / 9 + 4 / 9),
                math.sqrt(1 + 16 / 9 + 64 / 9 + 4 / 9),
                math.sqrt(25 + 16 / 9 + 256 / 9 + 16 / 9),
            ],
        ),
        ('mean_query', dict(mean_query=torch.tensor([[[1.0, 2, 3], [3, 2, 4]]])), [2.0, 2.0, 3.5]),
        ('class_query', dict(class_query=torch.tensor([[1.0, -2, 3]])), [1.0, -2.0, 3.0]),
    ],
)
def test_scorers(name, more, want):
    scores = scorer_of(name)(Seen(TOKENS, (1, 3), **more))
    torch.testing.assert_close(scores, torch.tensor([want]))


@pytest.mark.parametrize('hw', [(7, 10), (1, 6), (5, 1), (2, 2)])
@pytest.mark.parametrize('window', [3, 5])
def test_local_contrast_is_the_distance_from_the_mean_around(hw, window):
    x, reach = torch.randn(3, *hw, 4, dtype=torch.float64), window // 2
    want = torch.empty(3, *hw, dtype=torch.float64)
    for r, c in product(*map(range, hw)):
        rows, cols = (slice(max(0, i - reach), i + reach + 1) for i in (r, c))
        want[:, r, c] = (x[:, r, c] - x[:, rows, cols].mean((1, 2))).norm(dim=-1)
    scorer = build_from(SCORERS, 'scorer', dict(type='local_contrast', window=window), embed_dims=4)
    torch.testing.assert_close(scorer(Seen(x.flatten(1, 2), hw)), want.flatten(1))


@pytest.mark.parametrize('window', [1, 4, 2.5, '5'])
def test_a_window_without_a_centre_is_refused(window):
    with pytest.raises(ValueError, match=f'window={window!r} must be odd and at least 3'):
        build_from(SCORERS, 'scorer', dict(type='local_contrast', window=window), embed_dims=4)


def test_what_scorers_need():
    needs = {
        name: (cls.NEEDS, cls.learns)
        for name, cls in SCORERS.module_dict.items()
        if cls.__module__.startswith('idlevit')
    }
    assert needs == {
        'mean_distance': ('tokens', False),
        'local_contrast': ('tokens', False),
        'activation_norm': ('tokens', False),
        'mean_query': ('mean_query', False),
        'random': ('tokens', False),
        'uniform_grid': ('tokens', False),
        'learned': ('tokens', True),
        'class_query': ('class_query', False),
        'class_attention': ('class_attention', False),
    }


def test_random_follows_the_generator_alone():
    scorer, seen = scorer_of('random'), Seen(torch.randn(2, 6, 4), (2, 3))
    torch.manual_seed(4)
    first, second = scorer(seen), scorer(seen)
    torch.manual_seed(4)
    assert torch.equal(scorer(Seen(torch.zeros(2, 6, 4), (2, 3))), first)
    assert first.shape == (2, 6)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_grid_is_the_same_for_all_images():
    scores = scorer_of('uniform_grid')(Seen(torch.randn(2, 6, 4), (2, 3)))
    steps = 0.7548776662466927, 0.5698402909980532
    want = [(r * steps[0] + c * steps[1]) % 1 for r in range(2) for c in range(3)]
    torch.testing.assert_close(scores, torch.tensor([want, want]))


def test_attention_is_no_score():
    scorer = policy_of('EViT', class_token=True).scorer
    with pytest.raises(NotImplementedError, match='class_attention'):
        scorer(Seen(TOKENS, (1, 3)))


def test_learned_scores_lie_between_0_and_1_and_do_not_train_the_features():
    scorer = scorer_of('learned', hidden_dims=3)
    assert isinstance(scorer, Learned)
    assert scorer.hidden.out_features == 3
    for parameter in scorer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 35, 4, requires_grad=True)
    scores = scorer(Seen(100 * x, (5, 7)))
    assert scores.shape == (2, 35)
    assert scores.min() >= 0
    assert scores.max() <= 1
    scores.sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in scorer.parameters())
