"""Defaults of policies, errors for wrong settings, and the arithmetic of choosing."""

import itertools
import math

import pytest
import torch
from backbone_zoo import BY_NAME, FAMILIES, image, parametrize, stage_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import FAMILY_NAMES

from idlevit_mm.ops import map_units, window_units
from idlevit_mm.policies import ClassAttention, ClassQuery, EViT, MeanDistance, build_policy
from idlevit_mm.policies.select import best_places, num_active, unit_scores
from idlevit_mm.registry import POLICIES, SCORERS

QUICK = settings(deadline=None, max_examples=40, derandomize=True)


def first_policy(model):
    return stage_blocks(model)[0][0].policy


def test_default_scorers():
    for name, policy in itertools.product(FAMILY_NAMES, ('IdleViT', 'EViT', 'EvoViT')):
        variant = BY_NAME[name]
        built = first_policy(variant.build(policy=dict(type=policy)))
        want = MeanDistance
        if variant.has_class_token:
            want = ClassQuery if policy == 'IdleViT' else ClassAttention
        assert type(built.scorer) is want, (name, policy)
        assert built.scope == 'map'
        assert built.rounding == ('ceil' if policy == 'EViT' else 'nearest')


def test_default_policy():
    for policy in (None, {}, 'IdleViT', dict(type='IdleViT'), dict(scope=None)):
        assert type(build_policy(policy, 8, ('map',))).__name__ == 'IdleViT'


@parametrize()
def test_policies_of_a_family(variant):
    assert type(first_policy(variant.build())).__name__ == 'IdleViT'
    assert isinstance(first_policy(variant.build(policy='EViT')), EViT)


WRONG = {
    'unknown policy': (dict(type='Idle'), ['policy', "'Idle'", 'EViT', 'EvoViT', 'IdleViT']),
    'unknown policy by name': ('Idle', ['policy', "'Idle'", 'EViT', 'SparseViT']),
    'policy of wrong kind': (3, ['policy=3']),
    'type of wrong kind': (dict(type=3), ['policy', '3']),
    'rounding': (dict(rounding='up'), ['policy.rounding', "'up'", 'nearest', 'floor', 'ceil']),
    'alpha too large': (dict(type='EvoViT', alpha=1.5), ['policy.alpha', '1.5', '[0, 1]']),
    'alpha negative': (dict(type='EvoViT', alpha=-0.1), ['policy.alpha', '-0.1', '[0, 1]']),
    'alpha nan': (dict(type='EvoViT', alpha=math.nan), ['policy.alpha', 'nan', '[0, 1]']),
    'alpha of IdleViT': (dict(alpha=0.5), ['alpha', 'type', 'scorer', 'scope', 'rounding']),
    'fuse of EvoViT': (dict(type='EvoViT', fuse=True), ['fuse', 'alpha', 'representative']),
    'key of EViT': (dict(type='EViT', fusing=True), ['fusing', 'fuse', 'scorer']),
    'arguments of the block': (dict(embed_dims=3), ['embed_dims', 'scorer']),
    'scope of EViT': (dict(type='EViT', scope='window_tokens'), ['scope', 'window_tokens', 'map']),
    'scope of EvoViT': (dict(type='EvoViT', scope='windows'), ['scope', 'windows', 'map']),
    'scope of SparseViT': (dict(type='SparseViT', scope='map'), ['windows']),
    'learned EViT': (dict(type='EViT', scorer='learned'), ['scorer', 'learned', 'EViT', 'IdleViT']),
    'learned EvoViT': (dict(type='EvoViT', scorer='learned'), ['scorer', 'learned', 'IdleViT']),
    'context': (dict(context='some'), ['policy.context', "'some'", 'active', 'summary', 'all']),
    'learned with a typo': (dict(scorer=dict(type='learned', hidden=3)), ['hidden', 'hidden_dims']),
}


def refusal(build):
    with pytest.raises((ValueError, TypeError)) as error:
        build()
    message = str(error.value)
    assert '\n' not in message
    return message


def test_wrong_policies_are_refused(subtests):
    for name, (policy, words) in WRONG.items():
        with subtests.test(name):
            message = refusal(lambda p=policy: build_policy(p, 8, ('map', 'window_tokens')))
            for word in words:
                assert word in message, f'{message!r} does not mention {word!r}'


@parametrize()
def test_wrong_policies_of_a_family_are_refused(variant):
    for name in ('unknown policy', 'key of EViT', 'learned EvoViT', 'arguments of the block'):
        policy, words = WRONG[name]
        message = refusal(lambda policy=policy: variant.build(keep_ratios=0.5, policy=policy))
        assert all(word in message for word in words), message


def test_class_scorers_need_a_class_token():
    scorers = 'class_query', 'class_attention'
    for scorer, policy in itertools.product(scorers, ('IdleViT', 'EViT', 'EvoViT')):
        with pytest.raises(ValueError, match=rf"policy\.scorer='{scorer}' needs a class token"):
            build_policy(dict(type=policy, scorer=scorer), 8, ('map',))
    for name in ('swin', 'pvt', 'pvtv2', 'mit', 'vit-no-cls'):
        with pytest.raises(ValueError, match=r"policy\.scorer='class_query' needs a class token"):
            BY_NAME[name].build(policy=dict(scorer='class_query'))


def test_whole_windows_have_no_summary():
    with pytest.raises(ValueError, match=r"policy\.context='summary'.*windows.*active, all"):
        BY_NAME['swin'].build(policy=dict(scope='windows', context='summary'))


def test_class_attention_is_known_too_late_for_idlevit():
    with pytest.raises(ValueError, match=r"policy\.scorer='class_attention'.*EViT and EvoViT"):
        BY_NAME['vit'].build(policy=dict(scorer='class_attention'))


def test_sparsevit_needs_windows():
    for name in ('pvt', 'pvtv2', 'mit', 'vit', 'vit-no-cls'):
        with pytest.raises(ValueError, match=r"policy='SparseViT'.*windows.*map"):
            BY_NAME[name].build(policy=dict(type='SparseViT'))


def test_evovit_needs_attention_before_its_first_choice():
    vit = BY_NAME['vit']
    for ratios in (0.5, [0.9, 1.0, 1.0], [[0.5, 0.5, 0.5]]):
        with pytest.raises(ValueError, match=r'keep_ratios=.*EvoViT.*must be 1\.0'):
            vit.build(policy=dict(type='EvoViT'), keep_ratios=ratios)
        model = vit.build(policy=dict(type='EvoViT'))
        with pytest.raises(ValueError, match='keep_ratios'):
            model.set_keep_ratios(ratios)
        assert model.keep_ratios == [[1.0] * 3]
        vit.build(policy=dict(type='EvoViT', scorer='mean_distance'), keep_ratios=ratios)


@parametrize()
def test_rounding_is_used(variant):
    counts = []
    for rounding in ('floor', 'ceil'):
        model = variant.build(keep_ratios=0.5, policy=dict(type='IdleViT', rounding=rounding))
        model.eval()(image((1, 3, 20, 28)))
        counts.append(int(model.keep_masks[0][-1].sum()))
    assert counts[0] == counts[1] - 1


def test_registries_hold_what_the_documentation_names():
    shipped = {
        name
        for registry in (POLICIES, SCORERS)
        for name, cls in registry.module_dict.items()
        if cls.__module__.startswith('idlevit_mm')
    }
    assert shipped == {
        'IdleViT', 'EViT', 'EvoViT', 'SparseViT', 'mean_distance', 'activation_norm', 'mean_query',
        'random', 'uniform_grid', 'learned', 'class_query', 'class_attention', 'local_contrast',
    }  # fmt: skip


# --- properties --------------------------------------------------------------------------------

RATIO = st.floats(1e-6, 1.0)


@QUICK
@given(RATIO, st.integers(1, 5000))
def test_number_of_active_units(ratio, units):
    counts = {
        rounding: num_active(ratio, units, rounding) for rounding in ('floor', 'nearest', 'ceil')
    }
    assert all(1 <= count <= units for count in counts.values())
    assert counts['floor'] <= counts['nearest'] <= counts['ceil'] <= counts['floor'] + 1
    for rounding in counts:
        assert num_active(1.0, units, rounding) == units
        assert abs(counts[rounding] - ratio * units) <= 1.0


@QUICK
@given(st.integers(1, 3), st.integers(1, 30), st.data())
def test_best_places(batch, places, data):
    count = data.draw(st.integers(1, places))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randn(batch, places, generator=generator).round(decimals=1)
    best = best_places(scores, count)
    assert best.shape == (batch, count)
    assert (best.diff(dim=1) > 0).all()
    for row, ids in zip(scores, best, strict=True):
        rest = torch.ones(places, dtype=torch.bool).index_fill(0, ids, False)
        assert not rest.any() or row[ids].min() >= row[rest].max()


@QUICK
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_l2_score_of_a_window(height, width, window, shifted, seed):
    layout = window_units(height, width, window, window // 2 * shifted, True, torch.device('cpu'))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, height * width, generator=generator)
    total = unit_scores(scores, layout, 'l2')
    for unit, ids in enumerate(layout.token_ids[0]):
        ids = ids[ids >= 0]
        want = scores[:, ids].square().sum(1).sqrt() if len(ids) else torch.full((2,), -math.inf)
        torch.testing.assert_close(total[:, 0, unit], want)
    # The squares of all windows are the squares of the map: no token counts twice.
    finite = torch.where(total.isfinite(), total, 0.0)
    torch.testing.assert_close(finite.square().sum((1, 2)), scores.square().sum(1))


@QUICK
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 999))
def test_units_of_one_token_score_as_the_token(height, width, seed):
    scores = torch.rand(1, height * width, generator=torch.Generator().manual_seed(seed))
    layout = map_units(height, width, torch.device('cpu'))
    assert torch.equal(unit_scores(scores, layout, 'l2')[:, 0], scores)


def test_families_cover_every_scope():
    assert {scope for variant in FAMILIES for scope in variant.scopes} == {
        'map', 'window_tokens', 'windows',
    }  # fmt: skip
