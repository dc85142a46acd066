"""Plan, equal multiply-adds, config files and report of the policy study."""

import json
import re
from dataclasses import replace

import pytest
from mmengine.config import Config

from idlevit_mm.analysis import finetuning, policy_report, policy_study
from idlevit_mm.analysis.ledger import Result
from idlevit_mm.analysis.policy_study import (
    DENSE,
    METHODS,
    RANDOM_RATIOS,
    TASKS,
    Meter,
    Method,
    Run,
    Setup,
    Variant,
)
from idlevit_mm.analysis.runs import RunFailed

DEPTHS = (1, 3)
SWIN = dict(
    type='IdleSwinTransformer',
    embed_dims=8,
    depths=(2, 2),
    num_heads=(1, 2),
    strides=(4, 2),
    out_indices=(0, 1),
    window_size=3,
)


_START_OF = policy_study.start_of
_STARTS = {}


class _Meter:
    """Counts that are the mean keep ratio, in steps of a hundredth."""

    depths = DEPTHS

    def count(self, policy, keep_ratios):
        if isinstance(keep_ratios, float):
            keep_ratios = policy_study.uniform(keep_ratios, DEPTHS)
        flat = [ratio for stage in keep_ratios for ratio in stage]
        return round(100 * sum(flat) / len(flat))


class _Runner:
    """Dense 70, own methods 69.8, others 60, less where more is saved."""

    def __init__(self, own=69.8, others=60.0):
        self.done = []
        self.scores = {True: own, False: others}

    def __call__(self, run):
        self.done.append(run.name)
        variant = run.variant
        if variant.method == DENSE.name:
            score = 70.0
        elif variant.method == RANDOM_RATIOS:
            score = 65.0 + variant.keep_ratio
        else:
            score = self.scores[METHODS[variant.method].own] - 10 * ((variant.level or 0.33) - 0.33)
        return Result(round(score + 0.2 * run.seed, 3), 6.0)


def _quiet(_):
    pass


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Reading and dumping a config takes most of a test's time."""

    def start_of(task, checkpoint, epochs, extra_options=None):
        key = task.name, checkpoint.read_bytes(), epochs
        if key not in _STARTS:
            _STARTS[key] = _START_OF(task, checkpoint, epochs, extra_options)
        return replace(_STARTS[key], checkpoint=checkpoint)

    monkeypatch.setattr(policy_study, 'start_of', start_of)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'dense.pth'
    path.write_bytes(b'weights')
    return path


@pytest.fixture
def study(tmp_path, checkpoint):
    def run(runner, tasks=('swin-det', 'pvtv2-seg'), **options):
        return policy_study.run_study(
            checkpoints=dict.fromkeys(tasks, checkpoint),
            out_dir=tmp_path / 'out',
            runner=runner,
            meter=lambda start: _Meter(),
            report=_quiet,
            **options,
        )

    return run


# --- Patterns and methods ---------------------------------------------------------------------


def test_patterns():
    assert policy_study.uniform(0.5, (1, 2)) == [[0.5], [0.5, 0.5]]
    assert policy_study.stage_entry(0.5, (1, 3)) == [[0.5], [0.5, 1.0, 1.0]]
    assert policy_study.late(2)(0.5, (1, 3)) == [[1.0], [1.0, 0.5, 0.5]]
    assert policy_study.late(0)(0.5, (1, 3)) == policy_study.uniform(0.5, (1, 3))


def test_hooks_of_the_methods():
    (hook,) = METHODS['idlevit+cut+distill'].hooks('teacher.pth')
    assert hook['type'] == 'AuxiliaryLossHook'
    cut, distill = hook['losses']
    assert cut['type'] == 'TokenCutLoss'
    assert distill['teacher'] == {'checkpoint': 'teacher.pth'}
    assert METHODS['idlevit'].hooks('teacher.pth') == []
    (only,) = METHODS['idlevit+distill'].hooks('teacher.pth')
    assert [loss['type'] for loss in only['losses']] == ['FeatureDistillation']


def test_methods_are_filed_under_their_names_and_fit_their_tasks():
    assert all(name == method.name for name, method in METHODS.items())
    assert all(name == task.name for name, task in TASKS.items())
    assert METHODS['sparsevit'].fits('swin-det')
    assert not METHODS['sparsevit'].fits('pvtv2-det')
    assert not any(DENSE.fits(task) for task in TASKS)


@pytest.mark.parametrize('task', TASKS.values(), ids=lambda task: task.name)
def test_configs_are_there(task):
    assert task.config.is_file()
    assert task.dense_config.is_file()


# --- Plan -------------------------------------------------------------------------------------


def test_plan_is_balanced_when_it_is_interrupted():
    methods = ('dense', 'idlevit', 'sparsevit')
    plan = policy_study.plan_runs(('swin-det', 'pvtv2-det'), methods, (0.2, 0.45, 0.33), (0, 1))
    assert len(plan) == len(set(plan)) == len({run.name for run in plan})
    assert [run.seed for run in plan] == sorted(run.seed for run in plan)
    first = [run.variant for run in plan if run.seed == 0]
    assert first[:2] == [Variant('swin-det', 'dense'), Variant('pvtv2-det', 'dense')]
    levels = [variant.level for variant in first[2:] if variant.level is not None]
    assert levels == [0.33] * 3 + [0.2] * 3 + [0.45] * 3  # windows fit Swin alone
    served = [v for v in first if v.method == RANDOM_RATIOS]
    assert len(served) == len(policy_study.SERVED_RATIOS)
    # The dense row is the specialist for ratio 1: it is not run twice.
    special = [v for v in first if v.keep_ratio is not None and v.method != RANDOM_RATIOS]
    assert len(special) == len(served) - 1
    assert not any(run.variant.keep_ratio for run in plan if run.seed == 1)


# --- Equal multiply-adds ----------------------------------------------------------------------


@pytest.mark.parametrize(('target', 'expected'), [(670, 0.67), (1.0, 0.001), (999.6, 1.0)])
def test_bisection(target, expected):
    assert policy_study.nearest_ratio(lambda ratio: round(1000 * ratio), target) == expected


def test_bisection_stops_at_the_nearest_step():
    # Four windows: 0.25, 0.5, 0.75, 1.
    def count(ratio):
        return max(1, round(4 * ratio)) / 4

    assert count(policy_study.nearest_ratio(count, 0.6)) == 0.5
    assert count(policy_study.nearest_ratio(count, 0.66)) == 0.75


@pytest.mark.parametrize(
    'pattern', [policy_study.uniform, policy_study.stage_entry, policy_study.late(1)]
)
def test_levels_are_reached_on_a_real_backbone(monkeypatch, pattern):
    method = Method('here', dict(type='IdleViT', scorer='mean_query'), pattern)
    monkeypatch.setitem(METHODS, 'here', method)
    meter = Meter(SWIN, (53, 67))
    setup = policy_study.setup_of(Variant('swin-det', 'here', 0.2), meter)
    assert setup.operations == pytest.approx(0.8, abs=0.02)
    fresh = Meter(SWIN, (53, 67))
    counted = fresh.count(method.policy, setup.keep_ratios) / fresh.count(None, 1.0)
    assert counted == setup.operations


def test_a_level_out_of_reach_is_named(monkeypatch):
    monkeypatch.setitem(METHODS, 'here', Method('here', {}, policy_study.late(3)))
    with pytest.raises(ValueError, match=r'level=0\.33 .* here on swin-det.*0\.001, saves 0\.2'):
        policy_study.setup_of(Variant('swin-det', 'here', 0.33), _Meter())


def test_a_hook_that_is_not_there_is_named_before_any_training(monkeypatch, study):
    hooks = replace(METHODS['random'], hooks=lambda teacher: [dict(type='NoSuchHook')])
    monkeypatch.setitem(METHODS, 'random', hooks)
    with pytest.raises(ValueError, match='method=random needs the hook NoSuchHook'):
        study(None, tasks=('swin-det',), methods=('random',), random_ratios=False)


# --- One run ----------------------------------------------------------------------------------


def _start(task, checkpoint):
    return policy_study.start_of(TASKS[task], checkpoint, epochs=3)


def test_the_config_of_a_run(tmp_path, checkpoint):
    start = _start('swin-det', checkpoint)
    policy = {'type': 'EvoViT'}
    ratios = [[1.0, 0.5]] * 4
    setup = Setup(policy, ratios, '', 0.7, METHODS['idlevit+cut+distill'].hooks)
    path = tmp_path / 'run.py'
    path.write_text(policy_study.run_config(start, setup, seed=5, epochs=3))
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.policy == policy  # nothing of the base's policy is left
    assert cfg.model.backbone.keep_ratios == ratios
    assert cfg.model.backbone.type == 'IdleSwinTransformer'
    assert cfg.load_from == str(checkpoint)
    assert cfg.randomness.seed == 5
    assert cfg.train_cfg.max_epochs == cfg.train_cfg.val_interval == 3
    assert cfg.default_hooks.checkpoint.save_optimizer is False
    assert [schedule.end for schedule in cfg.param_scheduler] == [50, 3]
    assert cfg.param_scheduler[1].type == 'CosineAnnealingLR'
    losses = cfg.custom_hooks[0].losses
    assert losses[1].teacher.checkpoint == str(checkpoint)


def test_the_config_of_a_dense_run_has_the_policy_of_its_base(tmp_path, checkpoint):
    start = _start('pvtv2-seg', checkpoint)
    path = tmp_path / 'run.py'
    path.write_text(policy_study.run_config(start, Setup(None, 1.0, '1', 1.0), 0, 2))
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.keep_ratios == 1.0
    assert cfg.model.backbone.policy == start.cfg.model.backbone.policy
    assert cfg.get('custom_hooks') == start.cfg.get('custom_hooks')


class _Tools:
    """Stands in for the tools: notes calls, leaves a checkpoint and a metric."""

    def __init__(self, metric, value):
        self.calls = []
        self.number = 0
        self.entry = {metric: value}

    def __call__(self, arguments, log, *, threads=None, on_line=None):
        arguments = [str(argument) for argument in arguments]
        self.calls.append(arguments)
        self.number += 1
        folder = log.parent
        logs = folder / f'20260101_{self.number:06}' / 'vis_data'
        logs.mkdir(parents=True)
        (logs / 'scalars.json').write_text(json.dumps(self.entry) + '\n')
        if 'tools/train.py' in arguments:
            (folder / 'epoch_3.pth').write_bytes(b'')
            (folder / 'last_checkpoint').write_text(str(folder / 'epoch_3.pth'))


@pytest.mark.parametrize(
    ('task', 'value', 'points'), [('swin-det', 0.625, 62.5), ('pvtv2-seg', 62.5, 62.5)]
)
def test_scores_are_points_of_100(monkeypatch, tmp_path, checkpoint, task, value, points):
    tools = _Tools(TASKS[task].metric, value)
    monkeypatch.setattr(finetuning.runs, 'run_tool', tools)
    variant = Variant(task, 'idlevit', 0.33)
    setups = {variant: Setup(METHODS['idlevit'].policy, 0.5, '0.5', 0.67)}
    starts = {task: _start(task, checkpoint)}
    runner = policy_study.training_runner(starts, setups, tmp_path / 'runs', 3, 1)
    assert runner(Run(variant, 0)).score == points
    (call,) = tools.calls
    assert call[0] == 'tools/train.py'
    assert Config.fromfile(call[1]).model.backbone.keep_ratios == 0.5


def test_one_checkpoint_serves_many_ratios(monkeypatch, tmp_path, checkpoint):
    tools = _Tools('coco/bbox_mAP', 0.5)
    monkeypatch.setattr(finetuning.runs, 'run_tool', tools)
    pairs = policy_study.ratio_variants('swin-det')
    setups = {v: policy_study.setup_of(v, _Meter()) for pair in pairs for v in pair}
    starts = {'swin-det': _start('swin-det', checkpoint)}

    def runner(starts):
        return policy_study.training_runner(starts, setups, tmp_path / 'runs', 3, 1)

    for served, _ in pairs:
        runner(starts)(Run(served, 0))
    assert [call[0] for call in tools.calls] == ['tools/train.py'] + ['tools/test.py'] * 5
    cfg = Config.fromfile(tools.calls[0][1])
    assert cfg.custom_hooks[0].type == 'RandomKeepRatioHook'
    assert cfg.model.backbone.keep_ratios == 1.0
    ratios = [call[-1] for call in tools.calls[1:]]
    assert ratios[1] == 'model.backbone.keep_ratios=0.8'
    assert len(set(ratios)) == 5

    # Other weights at the start: the old checkpoint does not count.
    checkpoint.write_bytes(b'other')
    tools.calls.clear()
    runner({'swin-det': _start('swin-det', checkpoint)})(Run(pairs[0][0], 0))
    assert [call[0] for call in tools.calls] == ['tools/train.py', 'tools/test.py']


def test_an_empty_evaluation_does_not_get_an_earlier_score(monkeypatch, tmp_path):
    tools = _Tools('coco/bbox_mAP', 0.5)
    monkeypatch.setattr(finetuning.runs, 'run_tool', tools)
    arguments = (['tools/train.py'], tmp_path, 'train.log', 'coco/bbox_mAP', 1)
    assert finetuning.scored_tool(*arguments).score == 0.5
    tools.entry = {'data_time': 1.0}
    with pytest.raises(RunFailed, match='no coco/bbox_mAP'):
        finetuning.scored_tool(*arguments)


# --- The study --------------------------------------------------------------------------------


def test_whole_study(study, tmp_path):
    runner = _Runner()
    outcome = study(runner)
    assert outcome.complete
    assert len(runner.done) == len(outcome.results) == len(outcome.plan)
    text = policy_report.report_text(outcome, {}, 'python study')
    assert '| dense | – | 1 | 1.000 | 70.10 | – | 70.00, 70.20 |' in text
    idle = r'\| idlevit \| -33 % \| 0\.67\d? \| 0\.670 \| 69\.90 \| -0\.20 \| 69\.80, 70\.00 \|'
    assert re.search(idle, text)
    assert text.count('**met**') == 2
    assert '-0.20 against dense, +9.80 against ' in text
    assert '| 0.5 | 0.500 | 65.50 | 69.80 | -4.30 |' in text
    assert '| 1 | 1.000 | 66.00 | 70.00 | -4.00 |' in text
    assert 'sparsevit' not in text.split('## Semantic FPN')[1].split('## One')[0]
    assert 'standard deviation of 0.14' in text
    assert str(tmp_path) not in text

    again = _Runner()
    assert study(again).results == outcome.results
    assert again.done == []


def test_a_method_that_changed_is_run_again(study, monkeypatch):
    options = dict(
        tasks=('swin-det',),
        methods=('idlevit', 'random'),
        levels=(0.33,),
        seeds=(0,),
        random_ratios=False,
    )
    study(_Runner(), **options)
    monkeypatch.setitem(
        METHODS, 'random', replace(METHODS['random'], policy={'type': 'IdleViT', 'scorer': 'new'})
    )
    again = _Runner()
    assert study(again, **options).complete
    assert again.done == ['swin-det-random-minus33-seed0']


@pytest.mark.parametrize(
    ('scores', 'options', 'expected'),
    [
        ((69.0, 60.0), {}, '**missed** by 0.50 points against dense. '),
        ((69.8, 69.9), {}, '**missed** by 0.10 points against '),
        ((69.0, 69.9), {}, 'missed** by 0.50 points against dense and by 0.90 points against '),
        ((69.8, 60.0), {'methods': ('idlevit', 'random')}, '**open**, not tried: evit'),
        ((69.8, 60.0), {'methods': ('random',)}, 'not tried.'),
        ((69.8, 60.0), {'levels': (0.2,)}, 'not tried.'),
    ],
)
def test_goal(study, scores, options, expected):
    outcome = study(_Runner(*scores), tasks=('swin-det',), **options)
    assert expected in policy_report.goal_text(outcome, TASKS['swin-det'])


def test_goal_is_judged_over_the_seeds_that_are_there(study):
    outcome = study(_Runner(69.8, 60.0), tasks=('swin-det',))
    assert len({run.seed for run in outcome.plan}) == 2
    some = {
        run: result
        for run, result in outcome.results.items()
        if run.seed == 0 or run.variant.method in ('dense', 'idlevit')
    }
    text = policy_report.goal_text(replace(outcome, results=some), TASKS['swin-det'])
    assert 'runs missing)' in text
    assert '**met**' in text
    none = {run: result for run, result in some.items() if run.variant.method != 'random'}
    text = policy_report.goal_text(replace(outcome, results=none), TASKS['swin-det'])
    assert '**open**' in text


def test_unfinished_study_says_so(study):
    outcome = study(_Runner(), time_budget=-1.0)
    assert not outcome.complete
    assert outcome.results == {}
    text = policy_report.report_text(outcome, {}, 'python study')
    assert 'Unfinished' in text
    assert '**open**' in text


def test_speed_and_figure(study, tmp_path):
    pytest.importorskip('mmdet')
    outcome = study(
        _Runner(),
        tasks=('pvtv2-det',),
        methods=('idlevit', 'idlevit+cut', 'random'),
        levels=(0.33,),
        seeds=(0,),
    )
    setups = {
        variant: setup
        if setup.keep_ratios == 1.0
        else replace(setup, keep_ratios=policy_study.uniform(0.3, (2, 2, 2, 2)))
        for variant, setup in outcome.setups.items()
    }
    outcome = replace(outcome, setups=setups)
    shape = (1, 3, 64, 72)
    speeds = policy_report.measure_speeds(outcome, [shape], max_seconds=0.0)
    found = speeds[shape]
    assert set(found) == set(setups)
    assert found[Variant('pvtv2-det', 'dense')].against_dense.median == 1.0
    # They differ in training alone: the same backbone, timed once.
    plain, cut = (found[Variant('pvtv2-det', name, 0.33)] for name in ('idlevit', 'idlevit+cut'))
    assert plain == cut
    assert min(plain.against_dense.low, plain.against_host.low) > 0
    text = policy_report.report_text(outcome, speeds, 'python study')
    assert '| speed-up 1×64×72 |' in text
    assert '| 1.00 (' in text

    picture = tmp_path / 'pictures' / 'study.png'
    policy_report.draw(outcome, picture)
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'tasks': ('swin-det', 'vit')}, 'vit'),
        ({'tasks': ()}, 'tasks'),
        ({'methods': ('idlevit', 'none')}, 'none'),
        ({'levels': (0.3, 1.0)}, 'levels'),
        ({'levels': (0.3, 0.3)}, 'each once'),
        ({'seeds': ()}, 'seeds'),
        ({'epochs': 0}, 'epochs=0'),
        ({'jobs': 0}, 'jobs=0'),
    ],
)
def test_wrong_arguments_before_anything_runs(study, options, message):
    runner = _Runner()
    with pytest.raises(ValueError, match=message):
        study(runner, **options)
    assert runner.done == []
