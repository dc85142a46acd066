"""The study's plan, its memory and its choice, with runs that take no time."""

import json

import pytest

from idlevit_mm.analysis import study
from idlevit_mm.analysis.ledger import Result
from idlevit_mm.analysis.runs import REPOSITORY
from idlevit_mm.analysis.study import DENSE, Run, Variant

SCORERS = ('mean_distance', 'random')


def _ap(run):
    base = {None: 0.70, 'mean_distance': 0.65, 'random': 0.55}[run.variant.scorer]
    scope = {None: 0, 'map': 0, 'window_tokens': -0.04, 'windows': -0.02}[run.variant.scope]
    return round(base + scope + 0.1 * (run.variant.keep_ratio - 0.7) + 0.002 * run.seed, 4)


class _Runner:
    def __init__(self, seconds=10.0):
        self.done = []
        self.seconds = seconds

    def __call__(self, run):
        self.done.append(run.name)
        return Result(_ap(run), self.seconds)


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


def test_the_committed_runs_can_be_read():
    path = REPOSITORY / 'docs' / 'studies' / 'scorers.jsonl'
    settings = json.loads(path.read_text().splitlines()[0])['settings']
    results = study.open_ledger(path, settings).read()
    assert len(results) == 30
    assert study.best_scorer(results, study.SCORERS, (0.7, 0.5), (0, 1)) == 'mean_distance'


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
