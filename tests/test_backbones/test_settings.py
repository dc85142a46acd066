"""keep_ratios and policy: every way of setting them, and the errors for wrong values."""

import copy
import importlib
import inspect
import itertools
import math
import pickle
import re
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    SCORERS,
    VARIANTS,
    assert_close,
    image,
    kept,
    parametrize,
    randomize,
)
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from idlevit_mm.policies import normalize_keep_ratios
from idlevit_mm.registry import arguments_of


def depths(model):
    return [len(stage) for stage in model.keep_ratios]


def test_every_registered_backbone_is_in_the_table():
    registered = {name for name in MODELS.module_dict if name.startswith('Idle')}
    assert {v.type for v in VARIANTS} == registered
    assert {v.type for v in FAMILIES} == registered


# --- right values ----------------------------------------------------------------------------


@parametrize()
def test_default_is_dense(variant):
    model = variant.build()
    assert model.keep_ratios == [[1.0] * d for d in depths(model)]
    assert tuple(depths(model)) == variant.depths


def test_three_ways_to_write_ratios():
    variant = BY_NAME['swin']
    model = variant.build()
    d = depths(model)
    per_stage = [0.9, 0.5, 0.7, 1.0][: len(d)]
    per_block = [[0.1 + 0.1 * (s + b) for b in range(n)] for s, n in enumerate(d)]
    wanted_per_stage = [[r] * n for r, n in zip(per_stage, d, strict=True)]
    for given, want in (
        (0.7, [[0.7] * n for n in d]),
        (per_stage, wanted_per_stage),
        (tuple(per_stage), wanted_per_stage),
        (per_block, per_block),
        (tuple(map(tuple, per_block)), per_block),
    ):
        model.set_keep_ratios(given)
        assert model.keep_ratios == want
        assert variant.build(keep_ratios=given).keep_ratios == want


@parametrize()
def test_setting_acts_on_the_next_forward(variant):
    model = randomize(variant.build(keep_ratios=0.5)).eval()
    x = image((2, 3, 48, 64))
    with torch.no_grad():
        before = model(x)
        assert int(model.keep_masks[0][0].sum()) == 2 * kept(0.5, 192)
        model.set_keep_ratios(0.25)
        model(x)
        assert int(model.keep_masks[0][0].sum()) == 2 * kept(0.25, 192)
        model.set_keep_ratios(1.0)
        dense = model(x)
        assert all(mask.all() for stage in model.keep_masks for mask in stage)
        model.set_keep_ratios(0.5)
        after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[-1], dense[-1])


@parametrize()
def test_the_callers_list_is_not_shared(variant):
    given = [[0.5] * n for n in depths(variant.build())]
    model = variant.build(keep_ratios=given)
    given[0][0] = 0.9
    assert model.keep_ratios[0][0] == 0.5


@parametrize()
def test_whole_numbers_of_one_are_allowed(variant):
    assert variant.build(keep_ratios=1).keep_ratios == variant.build().keep_ratios


# --- wrong values ----------------------------------------------------------------------------

WRONG = {
    'zero': 0,
    'negative': -0.1,
    'above one': 1.2,
    'nan': math.nan,
    'infinite': math.inf,
    'text': 'a',
    'number as text': '0.5',
    'none': None,
    'bool': True,
    'dict': {0: 0.5},
    'empty': [],
    'too few stages': 'replace all by one less',
    'too many stages': [0.5] * 9,
    'wrong value in a stage': 'replace last stage with 0',
    'nan in a stage': 'replace last stage with nan',
    'bool in a stage': 'replace last stage with True',
    'text in a stage': 'replace last stage with text',
    'none in a stage': 'replace last stage with None',
    'empty stage': 'replace last stage with []',
    'too many blocks': 'replace last stage with nine',
    'wrong value in a block': 'replace last block with 1.5',
    'none in a block': 'replace last block with None',
    'list in a block': 'replace last block with list',
}


def wrong_value(name, d):
    value = WRONG[name]
    if name == 'too few stages':
        # For a backbone of one stage a flat list has one ratio per block.
        return [0.5] * ((len(d) if len(d) > 1 else d[0]) - 1)
    if not (isinstance(value, str) and value.startswith('replace')):
        return value
    bad = {
        '0': 0, 'nan': math.nan, 'True': True, 'text': 'half', 'None': None, '[]': [],
        'nine': [0.5] * 9, '1.5': 1.5, 'list': [0.5],
    }[value.split()[-1]]  # fmt: skip
    if 'block' in value:
        ratios = [[0.5] * n for n in d]
        ratios[-1][-1] = bad
        return ratios
    if isinstance(bad, list):
        return [*([0.5] * n for n in d[:-1]), bad]
    return [*[0.5] * (len(d) - 1), bad]


def shown(value):
    """The part of a wrong value that a message must show."""
    while isinstance(value, (list, tuple)) and value:
        value = value[-1]
    return repr(value)


def assert_refused(function, wrong):
    with pytest.raises((ValueError, TypeError), match='keep_ratios') as error:
        function(wrong)
    message = str(error.value)
    assert shown(wrong) in message, f'{message!r} does not show {shown(wrong)}'
    assert re.search(r'\(0, ?1\]', message), f'{message!r} does not say what is allowed'
    assert 'stage' in message
    assert '\n' not in message


def test_wrong_ratios_are_refused(subtests):
    for name, stages in itertools.product(WRONG, ((2, 2), (3,))):
        with subtests.test(name, stages=stages):
            assert_refused(
                lambda wrong, stages=stages: normalize_keep_ratios(wrong, stages),
                wrong_value(name, stages),
            )


@parametrize()
def test_wrong_ratios_of_a_backbone_are_refused(variant):
    model = variant.build(keep_ratios=0.5)
    for name in ('above one', 'too few stages', 'too many blocks', 'none in a block'):
        wrong = wrong_value(name, depths(model))
        assert_refused(lambda wrong: variant.build(keep_ratios=wrong), wrong)
        assert_refused(model.set_keep_ratios, wrong)
        # A failed call changes nothing.
        assert model.keep_ratios == [[0.5] * n for n in depths(model)]


@parametrize()
def test_stage_that_does_not_exist_is_named(variant):
    with pytest.raises((ValueError, AssertionError), match='out_indices'):
        variant.build(out_indices=(0, 4))
    with pytest.raises((ValueError, AssertionError), match='frozen_stages'):
        variant.build(frozen_stages=5)


@parametrize()
def test_wrong_length_says_the_right_one(variant):
    model = variant.build()
    # The entries of a flat list are blocks where there is one stage.
    count = len(depths(model)) if len(depths(model)) > 1 else depths(model)[0]
    with pytest.raises((ValueError, TypeError), match=rf'keep_ratios.*\b{count}\b'):
        model.set_keep_ratios([0.5] * (count + 1))
    blocks = depths(model)[-1]
    ratios = [*([0.5] * n for n in depths(model)[:-1]), [0.5] * (blocks + 1)]
    with pytest.raises((ValueError, TypeError), match=rf'keep_ratios.*\b{blocks}\b'):
        model.set_keep_ratios(ratios)


@torch.no_grad()
def test_spellings_of_a_policy_mean_the_same():
    """Keys that are missing or None take defaults; a scorer is a name or a dict."""
    defaults = [None, {}, dict(scorer='mean_distance'), dict(scope='map'), dict(scope=None)]
    spellings = [*defaults, dict(scorer=None, scope=None), dict(scorer=dict(type='mean_distance'))]
    others = [[dict(scorer=name), dict(scorer=dict(type=name))] for name in SCORERS]
    for policies in (spellings, *others):
        masks = []
        for policy in policies:
            model = randomize(BY_NAME['pvt'].build(keep_ratios=0.5, policy=policy))
            torch.manual_seed(2)
            model(image((1, 3, 48, 64)))
            masks.append(model.keep_masks[0][0])
        assert all(torch.equal(mask, masks[0]) for mask in masks), policies


@parametrize()
def test_policy_of_the_config_is_left_alone(variant):
    policy = dict(scorer=dict(type='random'))
    variant.build(keep_ratios=0.5, policy=policy)
    assert policy == dict(scorer=dict(type='random'))


WRONG_POLICIES = {
    'unknown scorer': (dict(scorer='best'), ['best', *SCORERS]),
    'unknown scorer in dict': (dict(scorer=dict(type='best')), ['best', *SCORERS]),
    'scorer without type': (dict(scorer=dict(power=2)), ['type']),
    'scorer of wrong kind': (dict(scorer=3), ['scorer', '3']),
    'unknown argument': (dict(scorer=dict(type='random', power=2)), ['power', 'random']),
    'unknown scope': (dict(scope='rows'), ['rows', 'map']),
    'scope of wrong kind': (dict(scope=3), ['scope', '3', 'map']),
    'unknown key': (dict(score='random'), ['score', 'scorer', 'scope']),
    'not a dict': ('random', ['policy', 'random']),
}


def test_wrong_policies_are_refused(subtests):
    for name, (policy, words) in WRONG_POLICIES.items():
        with subtests.test(name):
            with pytest.raises((ValueError, TypeError, KeyError)) as error:
                BY_NAME['vit'].build(keep_ratios=0.5, policy=policy)
            message = str(error.value)
            for word in words:
                assert word in message, f'{message!r} does not mention {word!r}'


@parametrize()
def test_scopes_of_windows_are_refused_without_windows(variant):
    for scope in ('window_tokens', 'windows'):
        if scope in variant.scopes:
            variant.build(keep_ratios=0.5, policy=dict(scope=scope))
            continue
        with pytest.raises((ValueError, TypeError)) as error:
            variant.build(keep_ratios=0.5, policy=dict(scope=scope))
        assert scope in str(error.value)
        assert 'map' in str(error.value)


# --- from configs ----------------------------------------------------------------------------


@pytest.mark.parametrize('scope', [None, 'mmengine', 'mmdet', 'mmseg'])
def test_builds_from_every_scope(scope):
    if scope in ('mmdet', 'mmseg'):
        pytest.importorskip(scope)
    for variant in FAMILIES:
        assert_builds(variant, scope)


def assert_builds(variant, scope):
    config = variant.config(keep_ratios=0.5)
    if scope in ('mmdet', 'mmseg'):
        models = importlib.import_module(f'{scope}.registry').MODELS
        assert type(models.build(dict(config))).__name__ == variant.type
    if scope is None:
        model = MODELS.build(config)
    else:
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(config)
    assert type(model).__name__ == variant.type
    assert model.keep_ratios[0][0] == 0.5


@parametrize()
def test_ratios_from_the_command_line(variant):
    config = Config(dict(model=dict(backbone=variant.config())))
    for given in (0.5, [0.5] * len(depths(variant.build()))):
        config.merge_from_dict({'model.backbone.keep_ratios': given})
        model = MODELS.build(config.model.backbone)
        assert {r for stage in model.keep_ratios for r in stage} == {0.5}
    for scorer in ('random', dict(type='random')):
        config = Config(dict(model=dict(backbone=variant.config(keep_ratios=0.5))))
        config.merge_from_dict({'model.backbone.policy': dict(scorer=scorer)})
        model = randomize(MODELS.build(config.model.backbone))
        model(image((1, 3, 48, 64)))


@parametrize()
def test_config_file_with_custom_imports(variant, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        "custom_imports = dict(imports=['idlevit_mm'], allow_failed_imports=False)\n"
        f'model = {variant.config(keep_ratios=[0.5] * len(depths(variant.build())))!r}\n'
    )
    model = MODELS.build(Config.fromfile(path).model)
    assert model.keep_ratios[-1][-1] == 0.5


@parametrize()
def test_unknown_constructor_argument_is_refused(variant):
    with pytest.raises(TypeError, match='keep_ratio'):
        variant.build(keep_ratio=0.5)


# --- what stands after construction ----------------------------------------------------------


# What cannot be built, or is nonsense, by argument.
_NO_COUNT = (0, -1, 1.5, 'x', float('nan'))
WRONG_NUMBERS = {
    **dict.fromkeys(('depths', 'num_layers', 'num_heads', 'embed_dims', 'in_channels'), _NO_COUNT),
    **dict.fromkeys(('window_size', 'patch_size', 'patch_sizes', 'strides'), _NO_COUNT),
    **dict.fromkeys(('sr_ratios', 'img_size', 'pretrain_img_size', 'num_stages'), _NO_COUNT),
    **dict.fromkeys(('paddings', 'num_registers'), (-1, 0.5)),
    'layer_scale': (-1, 'x'),
    'out_indices': (-2, 99, 0.5, 'x'),
    'frozen_stages': (-2, 99, 'x'),
    **dict.fromkeys(('mlp_ratio', 'mlp_ratios'), (0, -1, 'x')),
    **dict.fromkeys(('drop_rate', 'attn_drop_rate'), (-0.1, 1.1)),
    'drop_path_rate': (-0.1, 1, 2),
}


@parametrize()
def test_numbers_that_cannot_be_are_named(variant):
    arguments = arguments_of(MODELS.get(variant.type))
    for name in WRONG_NUMBERS.keys() & arguments.keys():
        given = variant.kwargs.get(name, arguments[name].default)
        for value in WRONG_NUMBERS[name]:
            wrong = [value, *given[1:]] if isinstance(given, (list, tuple)) else value
            named = f'{name}=[[(]?{re.escape(repr(value).strip("[]"))}'
            with pytest.raises(ValueError, match=named) as error:
                variant.build(**{name: wrong})
            assert '\n' not in str(error.value)
        if isinstance(arguments[name].default, (list, tuple)):
            for wrong in (1, []):
                with pytest.raises(ValueError, match=re.escape(f'{name}={wrong!r}')):
                    variant.build(**{name: wrong})


def test_numbers_are_told_by_place_whatever_names_a_subclass_adds():
    class Named(MODELS.get('IdleSwinTransformer')):
        def __init__(self, *args, name='', **kwargs):
            super().__init__(*args, **kwargs)

    assert Named(32, 3, 8, 4, 7, 2, (1, 1), (1, 2), (4, 2), (0, 1)).depths == (1, 1)
    with pytest.raises(ValueError, match='window_size=0'):
        Named(32, 3, 8, 4, 0)


@pytest.mark.parametrize(
    ('name', 'size'),
    [('swin', 'pretrain_img_size'), ('pvt', 'pretrain_img_size'), ('vit', 'img_size')],
)
def test_sizes_of_tables_may_be_any_whole_numbers(name, size):
    more = dict(use_abs_pos_embed=True) if name == 'swin' else {}
    for value in (np.int64(40), 40.0):
        tables = [
            {k: p.shape for k, p in BY_NAME[name].build(**{size: one}, **more).named_parameters()}
            for one in (40, value)
        ]
        assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ('name', 'options', 'said'),
    [
        ('swin', dict(num_heads=(3, 4)), r'num_heads=\(3, 4\) must divide .*\[8, 16\]'),
        ('swin', dict(use_abs_pos_embed=True, pretrain_img_size=3), 'pretrain_img_size=3 must be'),
        ('pvt', dict(pretrain_img_size=7), 'pretrain_img_size=7 must be'),
        ('vit', dict(num_heads=3), 'embed_dims=8 must be a multiple of num_heads=3'),
        ('vit-no-cls', dict(num_registers=4), 'num_registers=4 needs with_cls_token=True'),
    ],
)
def test_numbers_that_do_not_go_together(name, options, said):
    with pytest.raises(ValueError, match=said):
        BY_NAME[name].build(**options)


@parametrize((*FAMILIES, BY_NAME['vit-registers'], BY_NAME['vitdet-sam']))
def test_frozen_stages_are_frozen_in_the_constructor(variant):
    """Optimizers and wrappers of modules see it before any call of train()."""
    blocks = sum(variant.depths)
    for frozen in range(-1, (blocks if variant.is_plain else len(variant.depths)) + 1):
        model = variant.build(frozen_stages=frozen)
        built = {name: p.requires_grad for name, p in model.named_parameters()}
        expected = {
            name for name in built if any(name.startswith(part) for part in parts(variant, frozen))
        }
        assert {name for name, trains in built.items() if not trains} == expected, frozen
        model.train()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == built
        modes = {name: module.training for name, module in model.named_modules()}
        for stage in range(min(max(frozen, 0), len(variant.depths))):
            if not variant.is_plain:
                prefix = f'stages.{stage}' if variant.is_swin else f'layers.{stage}'
                assert not any(on for name, on in modes.items() if name.startswith(prefix))


def parts(variant, frozen):
    """What the names of frozen parameters begin with."""
    if frozen < 0:
        return []
    if variant.is_plain:
        first = ['patch_embed.', 'pos_embed', 'cls_token', 'register_tokens']
        if frozen == sum(variant.depths):
            first.append('channel_reduction.')
        return [*first, *(f'layers.{block}.' for block in range(frozen))]
    if variant.is_swin:
        count = frozen + 1 - variant.frozen_first
        stages = [f'{name}{stage}.' for stage in range(count) for name in ('stages.', 'norm')]
        return ['patch_embed.', 'absolute_pos_embed', *stages]
    if variant.is_twins:
        lists = 'patch_embeds', 'layers', 'position_encodings', 'norm_list'
        stages = [f'{name}.{stage}.' for stage in range(frozen) for name in lists]
        return ['patch_embeds.0.', *stages]
    return [f'layers.{stage}.' for stage in range(frozen)] if frozen else ['layers.0.0.']


@parametrize()
def test_masks_before_the_first_forward_stop_nobody_who_looks_around(variant):
    model = variant.build(keep_ratios=0.5, drop_path_rate=0.0)
    assert model.keep_masks == []
    assert hasattr(model, 'keep_masks')
    members = dict(inspect.getmembers(model))
    assert members['keep_masks'] == []
    assert all(hasattr(model, attribute) for attribute in dir(model))
    twins = copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(twin.keep_masks == [] for twin in twins)
    outs = model(image((1, 3, 48, 64)))
    for twin in twins:
        assert all(map(torch.equal, twin(image((1, 3, 48, 64))), outs))
    assert [len(stage) for stage in model.keep_masks] == depths(model)


@parametrize()
def test_masks_are_of_the_thread_that_asks(variant):
    model = variant.build(keep_ratios=0.5).eval()
    other = copy.copy(model)
    everyone, seen = Barrier(2), {}

    def look(batch):
        with torch.no_grad():
            model(image((batch, 3, 48, 64)))
        everyone.wait(60)
        seen[batch] = [[len(mask) for mask in stage] for stage in model.keep_masks]

    # Not compiled: torch.compile is not safe while another thread computes.
    threads = [Thread(target=look, args=(batch,)) for batch in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {batch: [[batch] * depth for depth in depths(model)] for batch in (2, 3)}
    assert model.keep_masks == other.keep_masks == []


@torch.no_grad()
@pytest.mark.parametrize('indices', [(3, 0), (0, 3), (2, 0, 1), -1])
def test_maps_of_a_plain_vit_come_in_the_order_of_its_blocks(indices):
    """As mmseg's class returns them."""
    variant = BY_NAME['vit']
    options = dict(num_layers=4, out_indices=indices)
    model = randomize(variant.build(**options)).eval()
    twin = variant.build_twin(**options)
    twin.load_state_dict(model.state_dict())
    twin.eval()
    x = image((2, 3, 45, 58))
    outs, want = model(x), twin(x)
    assert len(outs) == len(want)
    for out, theirs in zip(outs, want, strict=True):
        assert_close(out, theirs, 1e-5)
    # In that order whatever order they are asked for in.
    ordered = sorted(index % 4 for index in ([indices] if isinstance(indices, int) else indices))
    model.out_indices = tuple(ordered)
    assert all(torch.equal(a, b) for a, b in zip(outs, model(x), strict=True))
