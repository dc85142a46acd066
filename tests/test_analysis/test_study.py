"""The study's plan, its memory and its choice, with runs that take no time."""

import json
import threading

import pytest

from idlevit_mm.analysis import study
from idlevit_mm.analysis.runs import RunFailed
from idlevit_mm.analysis.study import DENSE, Ledger, Result, Run, Variant

SETTINGS = {'epochs': 4, 'checkpoint_sha256': 'abc'}
SCORERS = ('mean_distance', 'random')


def _ap(run):
    base = {None: 0.70, 'mean_distance': 0.65, 'random': 0.55}[run.variant.scorer]
    scope = {None: 0, 'map': 0, 'window_tokens': -0.04, 'windows': -0.02}[run.variant.scope]
    return round(base + scope + 0.1 * (run.variant.keep_ratio - 0.7) + 0.002 * run.seed, 4)


class _Runner:
    def __init__(self, seconds=10.0, fail=()):
        self.done = []
        self.seconds = seconds
        self.fail = fail

    def __call__(self, run):
        self.done.append(run.name)
        if run.name in self.fail:
            raise RunFailed(f'{run.name} broke')
        return Result(_ap(run), self.seconds)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'out' / 'runs.jsonl', SETTINGS)


def _quiet(_):
    pass


def test_plan():
    first = study.scorer_runs(SCORERS, (0.7, 0.5), (0, 1))
    assert len(first) == len(set(first)) == 2 * (1 + 2 * 2)
    assert first[0] == Run(DENSE, 0)
    assert {run.variant.scope for run in first[1:5]} == {'map'}
    second = study.scope_runs('random', study.SCOPES, (0.7, 0.5), (0, 1))
    assert len(second) == 2 * 2 * 2  # the whole map is done already
    assert {run.variant.scope for run in second} == {'window_tokens', 'windows'}
    assert not set(first) & set(second)
    assert len({run.name for run in first + second}) == len(first + second)


def test_finished_runs_are_not_done_again(ledger):
    plan = study.scorer_runs(SCORERS, (0.5,), (0,))
    first = _Runner()
    results = study.execute(plan[:2], ledger, first, jobs=1, report=_quiet)
    assert first.done == [run.name for run in plan[:2]]
    second = _Runner()
    again = study.execute(plan, Ledger(ledger.path, SETTINGS), second, jobs=1, report=_quiet)
    assert second.done == [plan[2].name]
    assert set(again) == set(plan)
    assert again.items() >= results.items()


def test_other_settings_are_other_runs(ledger):
    run = Run(DENSE, 0)
    ledger.add(run, Result(0.7, 1.0))
    assert ledger.read() == {run: Result(0.7, 1.0)}
    assert Ledger(ledger.path, dict(SETTINGS, epochs=5)).read() == {}


def test_half_a_line_loses_one_run_only(ledger):
    kept, torn, new = (Run(DENSE, seed) for seed in range(3))
    ledger.add(kept, Result(0.7, 1.0))
    ledger.add(torn, Result(0.6, 1.0))
    text = ledger.path.read_text()
    ledger.path.write_text(text[:-20])
    assert set(ledger.read()) == {kept}
    ledger.add(new, Result(0.5, 1.0))
    assert set(ledger.read()) == {kept, new}


def test_a_failure_keeps_what_was_done(ledger):
    plan = study.scorer_runs(SCORERS, (0.5,), (0,))
    runner = _Runner(fail={plan[1].name})
    with pytest.raises(RunFailed, match='broke'):
        study.execute(plan, ledger, runner, jobs=1, report=_quiet)
    assert set(ledger.read()) == {plan[0]}
    assert runner.done == [run.name for run in plan[:2]]  # nothing new was started


def test_no_run_is_started_that_would_end_too_late(ledger):
    plan = study.scorer_runs(SCORERS, (0.5,), (0,))
    now = iter(range(0, 1000, 10))
    with pytest.raises(study.OutOfTime, match='1 runs'):
        study.execute(
            plan,
            ledger,
            _Runner(seconds=10.0),
            jobs=1,
            deadline=25,
            clock=lambda: float(next(now)),
            report=_quiet,
        )
    assert len(ledger.read()) == 2


def test_several_runs_at_a_time(ledger):
    both = threading.Barrier(2, timeout=20)

    def runner(run):
        both.wait()  # breaks unless two runs are under way at once
        return Result(0.5, 1.0)

    plan = [Run(DENSE, seed) for seed in range(4)]
    assert len(study.execute(plan, ledger, runner, jobs=2, report=_quiet)) == 4


def test_best_scorer_is_the_best_on_average():
    results = {
        Run(Variant(0.7, 'a', 'map'), 0): Result(0.60, 1),
        Run(Variant(0.5, 'a', 'map'), 0): Result(0.60, 1),
        Run(Variant(0.7, 'b', 'map'), 0): Result(0.66, 1),
        Run(Variant(0.5, 'b', 'map'), 0): Result(0.50, 1),
        Run(Variant(0.5, 'b', 'windows'), 0): Result(0.99, 1),
        Run(DENSE, 0): Result(0.99, 1),
    }
    assert study.best_scorer(results, ('a', 'b'), (0.7, 0.5), (0,)) == 'a'
    del results[Run(Variant(0.5, 'b', 'map'), 0)]
    assert study.best_scorer(results, ('a', 'b'), (0.7, 0.5), (0,)) is None


def test_spread_between_seeds():
    variant = Variant(0.5, 'a', 'map')
    results = {
        Run(DENSE, 0): Result(0.70, 1),
        Run(DENSE, 1): Result(0.72, 1),
        Run(variant, 0): Result(0.60, 1),
        Run(variant, 1): Result(0.60, 1),
    }
    # Squares 2 * 0.01^2 and 0, one degree of freedom each.
    assert study.seed_deviation(results) == pytest.approx(0.01)
    assert study.seed_deviation({Run(DENSE, 0): Result(0.7, 1)}) is None


@pytest.fixture
def files(tmp_path):
    config = tmp_path / 'tune.py'
    config.write_text('train_cfg = dict(max_epochs=4)\n')
    checkpoint = tmp_path / 'dense.pth'
    checkpoint.write_bytes(b'weights')
    return {'config': config, 'checkpoint': checkpoint, 'out_dir': tmp_path / 'study'}


def _count(variants):
    return {variant: variant.keep_ratio for variant in variants}


def _run(files, runner, **options):
    options = {'scorers': SCORERS, 'count_operations': _count, 'report': _quiet} | options
    return study.run_study(**files, runner=runner, **options)


def test_whole_study(files):
    runner = _Runner()
    text, complete = _run(files, runner)
    assert complete
    assert len(runner.done) == 2 * (1 + 4) + 2 * 4
    assert 'Best scorer: **mean_distance**' in text
    assert '| dense | – | 1 | 0.731 | – | 0.730, 0.732 | 1.00 |' in text
    assert '| mean_distance | windows | 0.5 | 0.611 | -0.120 | 0.610, 0.612 | 0.50 |' in text
    assert not any('random-window' in name for name in runner.done)
    assert (files['out_dir'] / 'study.md').read_text() == text
    assert str(files['out_dir'].parent) not in text  # no folder of this machine

    again = _Runner()
    assert _run(files, again)[1]
    assert again.done == []
    lines = (files['out_dir'] / 'runs.jsonl').read_text().splitlines()
    assert len(lines) == len({json.dumps(json.loads(line)) for line in lines}) == 18

    files['checkpoint'].write_bytes(b'other weights')
    other = _Runner()
    _run(files, other)
    assert len(other.done) == 18


def test_unfinished_study_says_so(files):
    text, complete = _run(files, _Runner(seconds=100.0), time_budget=50, jobs=1)
    assert not complete
    assert 'Unfinished' in text
    assert 'Best scorer' not in text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'keep_ratios': (0.7, 1.0)}, 'keep_ratios'),
        ({'keep_ratios': (0.5, 0.5)}, 'each once'),
        ({'seeds': ()}, 'seeds'),
        ({'scopes': ('map', 'pixels')}, 'pixels'),
        ({'epochs': 0}, 'epochs=0'),
    ],
)
def test_wrong_arguments_before_anything_runs(files, options, message):
    runner = _Runner()
    with pytest.raises(ValueError, match=message):
        _run(files, runner, **options)
    assert runner.done == []


def test_options_of_a_run():
    from mmengine.config import Config

    cfg = Config(
        dict(
            train_cfg=dict(max_epochs=4),
            param_scheduler=[
                dict(type='LinearLR', by_epoch=False, begin=0, end=50),
                dict(type='CosineAnnealingLR', begin=1, end=4, T_max=3),
                dict(type='MultiStepLR', begin=0, end=4, milestones=[2, 3]),
            ],
        )
    )
    run = Run(Variant(0.5, 'random', 'windows'), 3)
    options = study.fine_tune_options(cfg, run, 'dense.pth', epochs=8)
    assert options['model.backbone.keep_ratios'] == 0.5
    assert options['model.backbone.policy.scorer'] == 'random'
    assert options['model.backbone.policy.scope'] == 'windows'
    assert options['randomness.seed'] == 3
    assert options['train_cfg.val_interval'] == options['train_cfg.max_epochs'] == 8
    cfg.merge_from_dict(options)
    warm_up, cosine, steps = cfg.param_scheduler
    assert warm_up.end == 50
    assert (cosine.begin, cosine.end, cosine.T_max) == (1, 8, 7)
    assert steps.milestones == [4, 6]
    dense = study.fine_tune_options(cfg, Run(DENSE, 0), 'dense.pth', epochs=8)
    assert dense['model.backbone.keep_ratios'] == 1.0
    assert 'model.backbone.policy.scorer' not in dense
