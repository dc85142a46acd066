"""Keep ratios that change during training: the two hooks, in tiny real runs."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from backbone_zoo import VARIANTS
from hypothesis import example, given
from hypothesis import strategies as st
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import Runner
from toy import ToyModel, toy_runner

from idlevit_mm.engine import load_checkpoint
from idlevit_mm.errors import SettingError
from idlevit_mm.hooks import KeepRatioWarmupHook, RandomKeepRatioHook
from idlevit_mm.hooks.keep_ratio import annealed_ratio, half_cosine

SWIN = next(variant for variant in VARIANTS if variant.is_swin)
# Down to the smallest that there is; and with a start that is no more than a few steps above.
ANY_RATIO = st.floats(0.0, 1.0, exclude_min=True)
JUST_ABOVE = st.tuples(ANY_RATIO, st.integers(0, 9)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1] * math.ulp(pair[0]), 1.0))
)
TARGETS = [[1.0, 0.5], [0.5, 0.25]]


class IdleToy(BaseModel):
    """A small Swin whose images are made of the toy data's three numbers."""

    def __init__(self, keep_ratios=TARGETS, backbones=1, policy=None):
        super().__init__()
        self.backbones = torch.nn.ModuleList(
            SWIN.build(keep_ratios=keep_ratios, policy=policy) for _ in range(backbones)
        )
        self.register_buffer('pattern', torch.rand(3, 33, 47))

    @property
    def ratios(self):
        return self.backbones[0].keep_ratios

    def forward(self, x, mode='tensor'):
        images = torch.stack(list(x))[:, :, None, None] * self.pattern
        maps = [out for backbone in self.backbones for out in backbone(images)]
        value = sum(out.square().mean() for out in maps)
        return dict(loss=value) if mode == 'loss' else [dict(score=value.item())] * len(images)


class Seen(Hook):
    """The ratios that the model computed with."""

    priority = 'LOWEST'

    def __init__(self, stop=None):
        self.train, self.evaluation, self.logged, self.stop = {}, [], {}, stop

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = getattr(runner.model, 'module', runner.model)
        self.train[runner.iter] = [backbone.keep_ratios for backbone in model.backbones]
        hub = runner.message_hub
        self.logged[runner.iter] = hub.get_scalar('train/keep_ratio').current()
        for record, ratios in zip(model.backbones[0].records, model.ratios, strict=True):
            idled = [plan.rows is not None for plan in record.plans]
            assert idled == [ratio < 1.0 for ratio in ratios]
        if runner.iter + 1 == self.stop:
            raise KeyboardInterrupt

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.evaluation.append(runner.model.ratios)

    after_test_iter = after_val_iter


def train(work_dir, hook, model=None, stop=None, **settings):
    torch.manual_seed(0)
    seen = Seen(stop)
    model = IdleToy() if model is None else model
    runner = toy_runner(work_dir, hooks=[hook, seen], model=model, **settings)
    if stop is None:
        runner.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    return runner, seen


def flat(tables):
    return [ratio for table in tables for stage in table for ratio in stage]


def warmup(**changes):
    return dict(type='KeepRatioWarmupHook', **{**dict(end=4, by_epoch=False), **changes})


def draws(**changes):
    return dict(type='RandomKeepRatioHook', **{**dict(low=0.2, high=0.9, per='block'), **changes})


# --- formulas --------------------------------------------------------------------------------


@given(
    st.integers(0, 50), st.integers(1, 50), st.one_of(st.tuples(ANY_RATIO, ANY_RATIO), JUST_ABOVE)
)
@example(0, 6, (0.6, math.nextafter(0.6, 1.0)))  # (1 - share) * target + share * start rises here
@example(0, 3, (0.25 + 2**-54, 0.75 + 2**-53))  # target + share * (start - target) misses start
@example(0, 50, (5e-324, 1.5e-323))
def test_the_cosine_falls_from_start_to_target(begin, length, pair):
    target, start = pair
    end = begin + length
    values = [
        annealed_ratio(target, start, half_cosine(step, begin, end)) for step in range(end + 3)
    ]
    assert values[: begin + 1] == [max(start, target)] * (begin + 1)
    assert values[end:] == [target] * 3
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert all(target <= value <= max(start, target) for value in values)


@given(st.lists(ANY_RATIO, min_size=2, max_size=8), ANY_RATIO, st.floats(0.0, 1.0))
def test_annealing_keeps_the_order_of_blocks(targets, start, share):
    targets = sorted(targets + [math.nextafter(target, 0.0) for target in targets], reverse=True)
    values = [annealed_ratio(target, start, share) for target in targets]
    assert values == sorted(values, reverse=True)
    # Nothing but the last digits differs from the formula.
    wanted = [(1.0 - share) * target + share * max(start, target) for target in targets]
    assert values == pytest.approx(wanted, rel=1e-15, abs=1e-320)


def test_the_cosine_is_evits():
    values = [annealed_ratio(0.7, 1.0, half_cosine(step, 2, 6)) for step in range(8)]
    want = [1, 1, 1, 0.85 + 0.15 * math.sqrt(0.5), 0.85, 0.85 - 0.15 * math.sqrt(0.5), 0.7, 0.7]
    assert values == pytest.approx(want, abs=1e-12)
    # Its recipe from scratch: from epoch 10 over 100 epochs, a step for each iteration.
    for epoch in (9, 10, 11, 59, 109, 110):
        for iteration in range(3 * epoch, 3 * epoch + 3):
            rate = 0.7 + 0.3 * 0.5 * (math.cos((iteration - 30) / 300 * math.pi) + 1)
            rate = 1.0 if epoch < 10 else 0.7 if epoch >= 110 else rate
            share = half_cosine(iteration, 10 * 3, 110 * 3)
            assert annealed_ratio(0.7, 1.0, share) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize('seed', range(3))
def test_pairs_are_drawn_as_sparsevits(seed):
    """Of each stage one ratio for two blocks, the largest first; an odd block is one by itself."""
    generator = np.random.default_rng(seed)
    depths, choices = (2, 5, 6), [tenth / 10 for tenth in range(2, 11)]
    hook = RandomKeepRatioHook(choices=choices, per='pair', descending=True, keep_dense=False)
    hook.targets = [[[1.0] * depth for depth in depths]]
    values = generator.choice(choices, 1 + 3 + 3).tolist()
    want, rest = [], list(values)
    for depth in depths:
        pairs = sorted((rest.pop(0) for _ in range(0, depth, 2)), reverse=True)
        want.append([pairs[block // 2] for block in range(depth)])
    assert hook.spread(values) == [want]


def test_draws_are_spread():
    for per, values, keep_dense, descending, want in (
        ('model', [0.3], True, False, [[1.0, 0.3], [0.3, 0.3]]),
        ('model', [0.3], False, False, [[0.3, 0.3], [0.3, 0.3]]),
        ('stage', [0.3, 0.4], True, True, [[1.0, 0.3], [0.4, 0.4]]),
        ('pair', [0.3, 0.4], True, True, [[1.0, 0.3], [0.4, 0.4]]),
        ('block', [0.1, 0.2, 0.3, 0.4], True, False, [[1.0, 0.2], [0.3, 0.4]]),
        ('block', [0.1, 0.2, 0.3, 0.4], True, True, [[1.0, 0.2], [0.4, 0.3]]),
        ('block', [0.1, 0.2, 0.3, 0.4], False, True, [[0.2, 0.1], [0.4, 0.3]]),
    ):
        hook = RandomKeepRatioHook(0.1, per=per, keep_dense=keep_dense, descending=descending)
        hook.targets = [TARGETS]
        assert hook.spread(values) == [want]


PER_ITERATION = dict(by_epoch=True, convert_to_iter_based=True)

# --- warm-up in a run ------------------------------------------------------------------------


def test_hooks_build_from_every_scope():
    for scope in ('mmengine', 'mmdet', 'mmseg'):
        if scope == 'mmengine' or importlib.util.find_spec(scope):
            with DefaultScope.overwrite_default_scope(scope):
                assert type(HOOKS.build(warmup())) is KeepRatioWarmupHook
                assert type(HOOKS.build(draws())) is RandomKeepRatioHook


@pytest.mark.parametrize(
    ('settings', 'by_epoch', 'step', 'begin', 'end'),
    [
        (dict(begin=2, end=7, by_epoch=False), False, 1, 2, 7),
        (dict(begin=1, end=3, by_epoch=True), True, 3, 1, 3),  # 3 iterations are an epoch
        (dict(begin=1, end=3, **PER_ITERATION), True, 1, 3, 9),
        (dict(end=3, **PER_ITERATION), False, 1, 0, 9),
    ],
)
def test_warmup_in_a_run(tmp_path, settings, by_epoch, step, begin, end):
    runner, seen = train(tmp_path, warmup(start_ratio=0.9, **settings), by_epoch=by_epoch)
    assert len(seen.train) == (12 if by_epoch else 10)
    for iteration, tables in seen.train.items():
        share = half_cosine(iteration // step, begin, end)
        assert flat(tables) == [annealed_ratio(r, 0.9, share) for r in flat([TARGETS])]
        assert seen.logged[iteration] == pytest.approx(np.mean(flat(tables)))
    assert flat(seen.train[0]) == [1.0, 0.9, 0.9, 0.9]
    assert seen.train[max(seen.train)] == [TARGETS]
    assert len({tuple(flat(tables)) for tables in seen.train.values()}) > 2
    assert seen.evaluation
    assert all(ratios == TARGETS for ratios in seen.evaluation)
    assert runner.model.ratios == TARGETS


def test_checkpoints_hold_no_ratios(tmp_path):
    train(tmp_path, draws())
    state = load_checkpoint(str(tmp_path / 'epoch_4.pth'))['state_dict']
    assert state.keys() == IdleToy().state_dict().keys()


def test_a_warmup_past_the_end_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr('logging.Logger.warning', lambda self, text, *_: told.append(text))
    train(tmp_path / 'late', warmup(end=5, by_epoch=True))
    assert any('end=5' in text and 'never trained' in text for text in told)
    told.clear()
    train(tmp_path / 'right', warmup(end=4, by_epoch=True))
    assert not any('never trained' in text for text in told)


@pytest.mark.parametrize('hook', [warmup(), draws()])
def test_a_dense_model_trains_dense_and_this_is_told(tmp_path, monkeypatch, hook):
    told = []
    monkeypatch.setattr('logging.Logger.warning', lambda self, text, *_: told.append(text))
    _, seen = train(tmp_path, hook, IdleToy(1.0))
    assert set(seen.logged.values()) == {1.0}
    assert any(hook['type'] in text and 'changes nothing' in text for text in told)


# --- random ratios in a run ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('per', 'source'),
    [
        *((per, {}) for per in ('model', 'stage', 'pair', 'block')),
        ('block', dict(low=None, high=1.0, choices=[0.7, 0.25, 0.4])),
    ],
)
def test_random_ratios_in_a_run(tmp_path, per, source):
    model = IdleToy(backbones=2)
    _, seen = train(tmp_path, draws(per=per, **source), model)
    tables = list(seen.train.values())
    for iteration, pair in seen.train.items():
        for first, second in pair:
            assert first[0] == 1.0
            assert (first[1] == second[0] == second[1]) or per != 'model'
            assert second[0] == second[1] or per == 'block'
            drawn = [first[1], *second]
            if source:
                assert set(drawn) <= {0.7, 0.25, 0.4}
            else:
                assert all(0.2 <= ratio <= 0.9 for ratio in drawn)
        assert (pair[0] == pair[1]) == (per == 'model') or source
        assert seen.logged[iteration] == pytest.approx(np.mean(flat(pair)))
    assert len({tuple(flat(pair)) for pair in tables}) >= 3
    assert all(ratios == TARGETS for ratios in seen.evaluation)
    assert all(backbone.keep_ratios == TARGETS for backbone in model.backbones)


def test_dense_blocks_are_drawn_if_asked(tmp_path):
    _, seen = train(tmp_path, draws(keep_dense=False, descending=True))
    for (table,) in seen.train.values():
        assert table[0][0] < 1.0
        assert all(stage == sorted(stage, reverse=True) for stage in table)
    assert len({tuple(flat(tables)) for tables in seen.train.values()}) == 12


def test_the_sandwich_takes_turns(tmp_path):
    _, seen = train(tmp_path, draws(sandwich=True))
    for iteration, (table,) in seen.train.items():
        drawn = [table[0][1], *table[1]]
        bread = {0: 0.9, 1: 0.2}.get(iteration % 4)
        assert table[0][0] == 1.0
        assert (drawn == [bread] * 3) if bread else (len(set(drawn)) == 3)


def test_ratios_follow_from_seed_and_iteration_alone(tmp_path):
    _, one = train(tmp_path / 'one', draws())
    _, same = train(tmp_path / 'same', draws(), by_epoch=False, runner=Runner)
    _, other = train(tmp_path / 'other', draws(), seed=1)
    assert all(one.train[iteration] == ratios for iteration, ratios in same.train.items())
    assert all(one.train[iteration] != ratios for iteration, ratios in other.train.items())


@pytest.mark.parametrize(
    ('hook', 'by_epoch'), [(warmup(begin=1, end=10), True), (draws(), False), (draws(), True)]
)
def test_resumed_runs_see_the_same_ratios(tmp_path, hook, by_epoch):
    _, whole = train(tmp_path / 'whole', hook, by_epoch=by_epoch)
    _, before = train(tmp_path / 'parts', hook, by_epoch=by_epoch, stop=7)
    runner, after = train(tmp_path / 'parts', hook, by_epoch=by_epoch, resume=True)
    assert min(after.train) == (6 if by_epoch else 4)
    assert {**before.train, **after.train} == whole.train
    assert {**before.logged, **after.logged} == whole.logged
    assert runner.model.ratios == TARGETS


def test_training_again_after_an_exception_knows_the_targets(tmp_path):
    model = IdleToy()
    runner, seen = train(tmp_path, draws(), model, stop=2)
    assert model.ratios != TARGETS
    runner.val()
    assert model.ratios == TARGETS
    seen.stop = None
    runner.call_hook('before_train_iter', batch_idx=0)
    assert model.ratios != TARGETS
    runner.train()
    assert model.ratios == TARGETS


def test_evaluating_alone_leaves_the_ratios(tmp_path):
    for hook in (warmup(), draws()):
        seen = Seen()
        runner = toy_runner(tmp_path, hooks=[hook, seen], model=IdleToy([0.75, 0.5]))
        runner.val()
        assert seen.evaluation == [[[0.75, 0.75], [0.5, 0.5]]] * 2


# --- errors before training ------------------------------------------------------------------


def sparse_toy():
    """Its policy ranks windows once per stage, so that ratios must not rise within one."""
    return IdleToy(policy='SparseViT')


def refused(tmp_path, hooks, model=None, **settings):
    seen = Seen()
    runner = toy_runner(tmp_path, hooks=[*hooks, seen], model=model or IdleToy(), **settings)
    with pytest.raises(SettingError) as error:
        runner.train()
    assert not seen.train
    assert '\n' not in str(error.value)
    if hasattr(runner.model, 'backbones'):
        assert runner.model.ratios == TARGETS
    return str(error.value)


def test_only_one_hook_sets_ratios(tmp_path):
    message = refused(tmp_path / 'both', [warmup(), draws()])
    assert 'KeepRatioWarmupHook, RandomKeepRatioHook' in message
    assert 'only one' in message
    assert 'only one' in refused(tmp_path / 'twice', [warmup(), warmup(begin=2)])


def test_a_model_without_idle_backbone_is_refused(tmp_path):
    for hook in (warmup(), draws()):
        message = refused(tmp_path, [hook], ToyModel())
        for word in (hook['type'], 'IdleBackbone', 'ToyModel'):
            assert word in message


def test_epochs_need_a_loop_of_epochs(tmp_path):
    message = refused(tmp_path, [warmup(by_epoch=True)], by_epoch=False)
    assert 'by_epoch=False' in message
    assert 'convert_to_iter_based=True' in message


@pytest.mark.parametrize('source', [dict(), dict(low=None, high=1.0, choices=[0.5, 0.3])])
def test_ratios_that_the_policy_refuses_are_found_before_training(tmp_path, source):
    message = refused(tmp_path, [draws(**source)], sparse_toy())
    for word in ('RandomKeepRatioHook', 'IdleSwinTransformer', 'SparseViT', 'rise'):
        assert word in message


def assert_each_is_named(hook, cases):
    for settings, words in cases:
        with pytest.raises((TypeError, ValueError), match=hook()['type']) as error:
            HOOKS.build(hook(**settings))
        for word in words:
            assert word in str(error.value)


def test_wrong_warmups():
    cases = [
        (dict(begin=4), ['begin=4', 'end=4']),
        (dict(begin=-1), ['begin=-1']),
        (dict(end=2.5), ['end=2.5', 'whole']),
        (dict(end=True), ['end=True']),
        (dict(start_ratio=1.5), ['start_ratio', '1.5', '(0, 1]']),
        (dict(start_ratio=math.nan), ['start_ratio', 'nan', '(0, 1]']),
        (dict(start_ratio='1'), ['start_ratio', "'1'"]),
        (dict(convert_to_iter_based=True), ['convert_to_iter_based', 'by_epoch=True']),
    ]
    assert_each_is_named(warmup, cases)


def test_wrong_draws():
    choices = dict(low=None, high=1.0)
    cases = [
        (dict(low=0), ['low', '0', '(0, 1]']),
        (dict(high=1.1), ['high', '1.1', '(0, 1]']),
        (dict(high=math.nan), ['high', 'nan']),
        (dict(low=0.95), ['low=0.95', 'high=0.9']),
        (dict(low='0.5'), ['low', "'0.5'"]),
        (dict(low=None), ['low', 'choices']),
        (dict(choices=[0.5]), ['low', 'choices=[0.5]']),
        (dict(low=None, choices=[0.5]), ['high=0.9', 'choices=[0.5]']),
        (dict(**choices, choices=[]), ['choices=[]']),
        (dict(**choices, choices=0.5), ['choices=0.5', 'list']),
        (dict(**choices, choices=[0.5, 2]), ['choices', '2', '(0, 1]']),
        (dict(per='layer'), ["'layer'", 'model, stage, pair, block']),
    ]
    assert_each_is_named(draws, cases)
