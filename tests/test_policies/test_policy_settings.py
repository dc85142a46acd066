"""Defaults of policies, errors for wrong settings, and the arithmetic of choosing."""

import itertools
import math

import pytest
from backbone_zoo import BY_NAME, image, parametrize, stage_blocks
from policy_cases import FAMILY_NAMES

from idlevit_mm.policies import ClassAttention, ClassQuery, MeanDistance, build_policy
from idlevit_mm.registry import POLICIES, SCORERS


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
    'scorer': (dict(scorer='best'), ["'best'", 'mean_distance', 'random', 'class_query']),
    'scorer by type': (dict(scorer=dict(type='best')), ["'best'", 'mean_distance']),
    'scorer without type': (dict(scorer=dict(power=2)), ['type']),
    'scorer of wrong kind': (dict(scorer=3), ['scorer', '3']),
    'argument of a scorer': (dict(scorer=dict(type='random', power=2)), ['power', 'random']),
    'scope': (dict(scope='rows'), ['rows', 'map']),
    'scope of wrong kind': (dict(scope=3), ['scope', '3', 'map']),
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
    for scope in ('window_tokens', 'windows'):
        if scope in variant.scopes:
            variant.build(keep_ratios=0.5, policy=dict(scope=scope))
        else:
            message = refusal(lambda scope=scope: variant.build(policy=dict(scope=scope)))
            assert f"'{scope}'" in message
            assert 'map' in message


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
