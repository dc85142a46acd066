"""keep_ratios and policy: every way of setting them, and the errors for wrong values."""

import copy
import importlib
import inspect
import math
import pickle
import re
from contextlib import nullcontext
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    SCORERS,
    VARIANTS,
    all_equal,
    assert_all_close,
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
    assert all_equal(before, after)
    assert not torch.equal(before[-1], dense[-1])


@parametrize()
def test_what_is_given_is_left_alone(variant):
    model = variant.build(keep_ratios=1)
    assert model.keep_ratios == [[1.0] * d for d in depths(model)] == variant.build().keep_ratios
    assert tuple(depths(model)) == variant.depths
    given, policy = [[0.5] * n for n in depths(model)], dict(scorer=dict(type='random'))
    model = variant.build(keep_ratios=given, policy=policy)
    given[0][0] = 0.9
    assert model.keep_ratios[0][0] == 0.5
    assert policy == dict(scorer=dict(type='random'))


# --- wrong values ----------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


def wrong_ratios(d):
    """Ratios that cannot be, for stages of these depths, and what a message must show of them."""
    for value in (0, -0.1, 1.2, NAN, INF, 'a', '0.5', None, True, {0: 0.5}):
        yield value, repr(value)
    stages = [0.5] * (len(d) - 1)
    for value in (0, NAN, True, 'half', None, []):
        yield [*stages, value], repr(value)
    blocks = [[0.5] * n for n in d[:-1]]
    for value in (1.5, None, [0.5]):
        yield [*blocks, [*[0.5] * (d[-1] - 1), value]], repr(value[0] if value == [0.5] else value)
    # The entries of a flat list are blocks where there is one stage.
    count = len(d) if len(d) > 1 else d[0]
    for number in (0, count - 1, count + 1):
        yield [0.5] * number, rf'\b{count}\b'
    yield [*blocks, [0.5] * (d[-1] + 1)], rf'\b{d[-1]}\b'


def assert_refused(function, wrong, words):
    with pytest.raises((ValueError, TypeError), match='keep_ratios') as error:
        function(wrong)
    message = str(error.value)
    for word in (words if words.startswith(r'\b') else re.escape(words), r'\(0, ?1\]', 'stage'):
        assert re.search(word, message), f'{message!r} does not say {word}'
    assert '\n' not in message


def test_wrong_ratios_are_refused(subtests):
    for stages in ((2, 2), (3,)):
        for wrong, words in wrong_ratios(stages):
            with subtests.test(str(wrong), stages=stages):
                assert_refused(lambda one, d=stages: normalize_keep_ratios(one, d), wrong, words)


@parametrize()
def test_wrong_ratios_of_a_backbone_are_refused(variant):
    model = variant.build(keep_ratios=0.5)
    for wrong, words in list(wrong_ratios(depths(model)))[2::4]:
        assert_refused(lambda wrong: variant.build(keep_ratios=wrong), wrong, words)
        assert_refused(model.set_keep_ratios, wrong, words)
        # A failed call changes nothing.
        assert model.keep_ratios == [[0.5] * n for n in depths(model)]


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


# --- from configs ----------------------------------------------------------------------------


@parametrize()
def test_builds_from_configs_of_every_scope(variant, tmp_path):
    ratios = [0.5] * len(depths(variant.build()))
    (tmp_path / 'config.py').write_text(
        "custom_imports = dict(imports=['idlevit_mm'], allow_failed_imports=False)\n"
        f'model = {variant.config(keep_ratios=0.9)!r}\n'
    )
    config = Config.fromfile(tmp_path / 'config.py')
    for scope in (None, 'mmengine', 'mmdet', 'mmseg'):
        if scope in ('mmdet', 'mmseg'):
            pytest.importorskip(scope)
            models = importlib.import_module(f'{scope}.registry').MODELS
            assert type(models.build(dict(config.model))).__name__ == variant.type
        for given in (0.5, ratios):  # as on a command line
            config.merge_from_dict({'model.keep_ratios': given})
            with DefaultScope.overwrite_default_scope(scope) if scope else nullcontext():
                model = MODELS.build(config.model)
            assert type(model).__name__ == variant.type
            assert {r for stage in model.keep_ratios for r in stage} == {0.5}
    for scorer in ('random', dict(type='random')):
        config.model.pop('policy', None)
        config.merge_from_dict({'model.policy': dict(scorer=scorer)})
        randomize(MODELS.build(config.model))(image((1, 3, 48, 64)))
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
        assert model.eval() is model
        assert model.train() is model
        assert {name: p.requires_grad for name, p in model.named_parameters()} == built
        for name, module in model.named_modules():
            if any(f'{name}.'.startswith(part) for part in parts(variant, frozen)):
                assert not module.training, name
            elif not list(module.children()) and re.match(r'(layers|stages)\.', name):
                assert module.training, name


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
        assert all_equal(twin(image((1, 3, 48, 64))), outs)
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
    assert_all_close(outs, want, 1e-5)
    # In that order whatever order they are asked for in.
    ordered = sorted(index % 4 for index in ([indices] if isinstance(indices, int) else indices))
    model.out_indices = tuple(ordered)
    assert all_equal(outs, model(x))
