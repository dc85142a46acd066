"""Schedules of keep ratios: powers, evit, flat lists, and the errors for wrong ones."""

import math

import pytest
from backbone_zoo import parametrize
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

from idlevit_mm.policies import checked_ratio, normalize_keep_ratios
from idlevit_mm.policies.select import num_active

DEPTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
RATIOS = st.floats(0.05, 1.0)


def flat(ratios):
    return [ratio for stage in ratios for ratio in stage]


def runs(values):
    """Lengths of the runs of equal values."""
    lengths = [1]
    for one, other in zip(values, values[1:], strict=False):
        if one == other:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


# Depth, first idle block and groups as published: DeiT, LV-ViT-S, LV-ViT-M.
@pytest.mark.parametrize(
    ('depth', 'first_idle', 'groups'),
    [(12, 4, [3, 3, 2]), (16, 4, [4, 4, 4]), (20, 5, [5, 5, 5])],
)
def test_powers_of_the_paper(depth, first_idle, groups):
    schedule = dict(type='powers', keep_ratio=0.7, first_idle=first_idle)
    (ratios,) = normalize_keep_ratios(schedule, (depth,))
    assert runs(ratios) == [first_idle, *groups]
    assert sorted(set(ratios), reverse=True) == [1.0, 0.7, 0.7**2, 0.7**3]


@pytest.mark.parametrize(('name', 'depth'), [('3+3+2', 12), ('3+3+3', 12), ('4+4+4', 16)])
def test_groups_by_name(name, depth):
    sizes = [int(size) for size in name.split('+')]
    (ratios,) = normalize_keep_ratios(dict(type=name, keep_ratio=0.7), (depth,))
    want = [0.7 ** (group + 1) for group, size in enumerate(sizes) for _ in range(size)]
    assert ratios == [1.0] * (depth - sum(sizes)) + want


@pytest.mark.parametrize(('name', 'first'), [('35ms', 0.6), ('33ms', 0.7)])
def test_sparsevits_own_schedules(name, first):
    """So many windows as the release keeps: int(windows * (1 - share)), shares for two blocks."""
    schedule = normalize_keep_ratios(dict(type=f'sparsevit-{name}'), (2, 2, 6, 2))
    idle = [[first, first], [0, 0], [0.2, 0.2, 0.4, 0.4, 0.5, 0.5], [0, 0]]
    for windows in (*range(10, 80), 1392):
        for ratios, shares in zip(schedule, idle, strict=True):
            counts = [num_active(ratio, windows, 'floor') for ratio in ratios]
            assert counts == [int(windows * (1 - share)) for share in shares]


def test_powers_count_blocks_over_the_whole_network():
    schedule = dict(type='powers', keep_ratio=0.5, first_idle=3, groups=2)
    assert normalize_keep_ratios(schedule, (2, 2, 3)) == [
        [1.0, 1.0],
        [1.0, 0.5],
        [0.5, 0.25, 0.25],
    ]


def test_powers_defaults():
    assert normalize_keep_ratios(dict(type='powers', keep_ratio=0.5), (2, 2)) == [
        [0.5, 0.5],
        [0.25, 0.125],
    ]


def test_evit_idles_in_its_blocks_alone():
    schedule = dict(type='evit', keep_ratio=0.7)
    (ratios,) = normalize_keep_ratios(schedule, (12,))
    assert [i for i, ratio in enumerate(ratios) if ratio == 0.7] == [3, 6, 9]
    assert sorted(set(ratios)) == [0.7, 1.0]
    schedule['blocks'] = (4, 0)
    assert normalize_keep_ratios(schedule, (2, 3)) == [[0.7, 1.0], [1.0, 1.0, 0.7]]


@given(st.data(), DEPTHS, st.floats(0.05, 0.95))
def test_groups_are_even_and_larger_first(data, depths, ratio):
    total = sum(depths)
    first_idle = data.draw(st.integers(0, total - 1))
    groups = data.draw(st.integers(1, total - first_idle))
    schedule = dict(type='powers', keep_ratio=ratio, first_idle=first_idle, groups=groups)
    ratios = normalize_keep_ratios(schedule, depths)
    assert [len(stage) for stage in ratios] == depths
    assert flat(ratios)[:first_idle] == [1.0] * first_idle
    idle = flat(ratios)[first_idle:]
    sizes = runs(idle)
    assert len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    starts = [sum(sizes[:j]) for j in range(groups)]
    assert [idle[start] for start in starts] == [ratio ** (j + 1) for j in range(groups)]


def any_spelling(depths):
    total = sum(depths)
    per_block = st.tuples(*(st.lists(RATIOS, min_size=d, max_size=d) for d in depths))
    spellings = [
        RATIOS,
        st.lists(RATIOS, min_size=len(depths), max_size=len(depths)),
        per_block,
        st.fixed_dictionaries(
            dict(type=st.just('powers'), keep_ratio=RATIOS, groups=st.just(1)),
            optional=dict(first_idle=st.integers(0, total - 1)),
        ),
        st.fixed_dictionaries(
            dict(
                type=st.just('evit'),
                keep_ratio=RATIOS,
                blocks=st.lists(st.integers(0, total - 1), min_size=1, unique=True),
            )
        ),
    ]
    if len(depths) == 1:
        spellings.append(st.lists(RATIOS, min_size=total, max_size=total))
    return st.one_of(spellings)


@given(st.data(), DEPTHS)
def test_normalising_twice_changes_nothing(data, depths):
    once = normalize_keep_ratios(data.draw(any_spelling(depths)), depths)
    assert [len(stage) for stage in once] == depths
    assert all(0.0 < ratio <= 1.0 for ratio in flat(once))
    assert normalize_keep_ratios(once, depths) == once


# --- one stage -------------------------------------------------------------------------------


def test_one_stage_takes_one_ratio_per_block():
    ratios = [1.0, 0.5, 0.25]
    for spelling in (ratios, tuple(ratios), [ratios], [tuple(ratios)]):
        assert normalize_keep_ratios(spelling, (3,)) == [ratios]


def test_one_entry_is_the_stage():
    assert normalize_keep_ratios([0.5], (3,)) == [[0.5] * 3]
    assert normalize_keep_ratios([0.5], (1,)) == [[0.5]]
    assert normalize_keep_ratios([[0.5]], (1,)) == [[0.5]]


def test_wrong_lists_of_one_stage(subtests):
    for wrong, words in (
        ([0.5, 0.5], ['2 entries', '1 stage of 3 blocks']),
        ([0.5] * 4, ['4 entries', '3 blocks']),
        ([[0.5], [0.5], [0.5]], ['[0.5]', 'not a number']),
        ([0.5, 0.5, math.nan], ['nan', '(0, 1]']),
        ([], ['0 entries']),
    ):
        with subtests.test(str(wrong)):
            with pytest.raises((TypeError, ValueError), match='keep_ratios=') as error:
                normalize_keep_ratios(wrong, (3,))
            assert all(word in str(error.value) for word in words), error.value


def test_more_stages_take_no_flat_list():
    with pytest.raises(ValueError, match='4 entries for 2 stages'):
        normalize_keep_ratios([0.5] * 4, (2, 2))


# --- wrong schedules -------------------------------------------------------------------------

WRONG = {
    'no type': (dict(keep_ratio=0.5), ['None', 'powers', 'evit']),
    'unknown type': (dict(type='cosine', keep_ratio=0.5), ["'cosine'", 'powers', 'evit']),
    'type of wrong kind': (dict(type=['powers'], keep_ratio=0.5), ["['powers']", 'powers']),
    'empty': ({}, ['None']),
    'unknown key': (
        dict(type='powers', keep_ratio=0.5, first=1),
        ["'first'", 'first_idle', 'groups'],
    ),
    'key of the other': (dict(type='evit', keep_ratio=0.5, groups=1), ["'groups'", 'blocks']),
    'no ratio': (dict(type='powers'), ['keep_ratio']),
    'nan': (dict(type='powers', keep_ratio=math.nan), ['nan', '(0, 1]']),
    'zero': (dict(type='evit', keep_ratio=0, blocks=[1]), ['holds 0', '(0, 1]']),
    'above one': (dict(type='powers', keep_ratio=1.5), ['holds 1.5', '(0, 1]']),
    'text': (dict(type='powers', keep_ratio='0.5'), ["'0.5'", 'number']),
    'bool': (dict(type='powers', keep_ratio=True), ['True', 'number']),
    'vanishing power': (dict(type='powers', keep_ratio=1e-200), ['0.0', '(0, 1]']),
    'first_idle too large': (
        dict(type='powers', keep_ratio=0.5, first_idle=5),
        ['5 for first_idle', '0 to 4'],
    ),
    'first_idle negative': (
        dict(type='powers', keep_ratio=0.5, first_idle=-1),
        ['-1 for first_idle', '0 to 4'],
    ),
    'first_idle a float': (
        dict(type='powers', keep_ratio=0.5, first_idle=1.0),
        ['1.0 for first_idle', 'whole number'],
    ),
    'no groups': (dict(type='powers', keep_ratio=0.5, groups=0), ['0 for groups', '1 to 5']),
    'more groups than blocks': (
        dict(type='powers', keep_ratio=0.5, first_idle=3),
        ['3 for groups', '1 to 2'],
    ),
    'block too large': (dict(type='evit', keep_ratio=0.5, blocks=[1, 5]), ['5 for blocks']),
    'few blocks': (dict(type='3+3+2', keep_ratio=0.5), ['8 blocks of 5']),
    'other depths': (dict(type='sparsevit-35ms'), ['(2, 2, 6, 2)', '(2, 3)']),
    'a ratio too many': (dict(type='sparsevit-35ms', keep_ratio=0.5), ["'keep_ratio'"]),
    'block twice': (dict(type='evit', keep_ratio=0.5, blocks=[1, 1]), ['twice', '[1, 1]']),
    'no block': (dict(type='evit', keep_ratio=0.5, blocks=[]), ['blocks=[]']),
    'a block alone': (dict(type='evit', keep_ratio=0.5, blocks=3), ['blocks=3', 'list']),
    'default blocks of a short network': (dict(type='evit', keep_ratio=0.5), ['6 for blocks']),
}


def test_wrong_schedules_are_refused(subtests):
    for name, (schedule, words) in WRONG.items():
        with subtests.test(name):
            with pytest.raises((TypeError, ValueError), match='keep_ratios=') as error:
                normalize_keep_ratios(schedule, (2, 3))
            message = str(error.value)
            for word in [*words, repr(schedule), 'allowed: ']:
                assert word in message
            assert '\n' not in message


def test_checked_ratio_names_its_subject():
    assert checked_ratio(1, 'low is') == 1.0
    with pytest.raises(ValueError, match=r'low is 0, which is not in \(0, 1\]'):
        checked_ratio(0, 'low is')


# --- in a backbone ---------------------------------------------------------------------------


@parametrize()
def test_backbones_take_schedules(variant):
    total = sum(variant.build().depths)
    schedule = dict(type='powers', keep_ratio=0.5, first_idle=1, groups=1)
    model = variant.build(keep_ratios=schedule)
    assert flat(model.keep_ratios) == [1.0] + [0.5] * (total - 1)
    model.set_keep_ratios(dict(type='evit', keep_ratio=0.25, blocks=[total - 1]))
    assert flat(model.keep_ratios) == [1.0] * (total - 1) + [0.25]
    with pytest.raises(ValueError, match='first_idle'):
        model.set_keep_ratios(dict(schedule, first_idle=total))
    assert flat(model.keep_ratios)[-1] == 0.25


def test_spellings_replace_each_other_in_a_config():
    """As docs/schedules.md says."""
    for old in (0.7, [1.0, 0.5], dict(type='evit', keep_ratio=0.5, blocks=[1])):
        config = Config(dict(backbone=dict(keep_ratios=old)))
        config.merge_from_dict({'backbone.keep_ratios': 0.25})
        assert normalize_keep_ratios(config.backbone.keep_ratios, (1, 2)) == [[0.25], [0.25] * 2]
        child = dict(_delete_=True, type='powers', keep_ratio=0.5)
        merged = Config._merge_a_into_b(
            dict(backbone=dict(keep_ratios=child)), dict(backbone=dict(keep_ratios=old))
        )
        ratios = Config(merged).backbone.keep_ratios
        assert normalize_keep_ratios(ratios, (1, 2)) == [[0.5], [0.25, 0.125]]
