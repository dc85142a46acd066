"""The studies: their plan, equal multiply-adds, memory and tables, with runs that take no time."""

import argparse
import re
import sys
import threading
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools' / 'studies'))

import report  # noqa: E402
import run  # noqa: E402
import variants  # noqa: E402

from idlevit_mm.errors import UsageError  # noqa: E402
from idlevit_mm.policies import normalize_keep_ratios  # noqa: E402


@pytest.fixture
def shares(monkeypatch):
    """Multiply-adds that are the mean keep ratio of two stages."""

    def operations(task, policy, ratios):
        stages = ratios if isinstance(ratios, list) else [[ratios]]
        flat = [ratio for stage in stages for ratio in stage]
        return sum(flat) / len(flat)

    for module in (variants, report):
        monkeypatch.setattr(module, 'operations', operations)
    monkeypatch.setattr(
        variants, '_backbone', lambda task, policy: argparse.Namespace(depths=(1, 3))
    )


@pytest.fixture
def study(tmp_path, monkeypatch, shares):
    """Runs a study by its command line; returns its exit, its text and the tools it called."""
    checkpoint = tmp_path / 'work' / 'retinanet_idle-swin_dense_digits' / 'epoch_12.pth'
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b'weights')
    calls, parsing = [], threading.Lock()

    def call(folder, threads, tool, config, *arguments):
        calls.append([tool, Path(config).name, *map(str, arguments)])
        with parsing:  # the real one does it in a process of its own
            cfg = Config.fromfile(config).model.backbone
        score = {'random': 0.5}.get(cfg.policy.get('scorer'), 0.6)
        score = score if cfg.keep_ratios != 1.0 else 0.65
        logs = folder / '2026' / 'vis_data'
        logs.mkdir(parents=True)
        (logs / 'scalars.json').write_text(f'{{"loss": 1}}\n{{"coco/bbox_mAP": {score}}}\n')

    monkeypatch.setattr(run, 'call', call)

    def do(*arguments):
        calls.clear()
        options = ['--dense-dir', tmp_path / 'work', '--out-dir', tmp_path / 'out']
        monkeypatch.setattr(sys, 'argv', ['run.py', *map(str, (*arguments, *options))])
        run.main(run.parse_args())
        return (tmp_path / 'out' / 'study.md').read_text(), list(calls)

    return do


def cells(text):
    """The rows of all tables in a text, without the spaces around their cells."""
    lines = [line for line in text.splitlines() if line.startswith('|') and line[1] != ':']
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    return [row for row in rows if not set(row[0]) <= {'-'}]


def test_plan_is_balanced_when_it_is_interrupted(shares):
    tasks, methods = ('swin-det', 'pvtv2-det'), ('idlevit', 'sparsevit')
    plan = list(variants.planned_runs((0, 1), (0.33, 0.2, 0.45), (), tasks, methods))
    assert len({one.name for one in plan}) == len(plan)
    assert [one.seed for one in plan] == sorted(one.seed for one in plan)
    first = [one for one in plan if one.seed == 0]
    assert [(one.variant['task'], one.variant['method']) for one in first[:2]] == [
        ('swin-det', 'dense'),
        ('pvtv2-det', 'dense'),
    ]
    levels = [one.variant['level'] for one in first if one.variant['level'] is not None]
    assert levels == [0.33] * 3 + [0.2] * 3 + [0.45] * 3  # windows fit Swin alone
    assert not any(one.served or one.variant['keep_ratio'] for one in plan)


def test_plan_of_many_ratios_and_of_larger_images(shares):
    methods = 'idlevit', 'evovit+distill-sandwich', 'evovit-1.25x', 'dense-1.25x'
    plan = list(variants.planned_runs((2,), (), (0.7,), ('swin-det', 'pvtv2-det'), methods))
    of_swin = [one for one in plan if one.variant['task'] == 'swin-det'][2:]
    sandwich, larger, dense = of_swin
    assert [len(one.served) for one in of_swin] == [5, 0, 0]
    # Blocks that are to be drawn ratios must idle by themselves, as the hook leaves others dense.
    assert sandwich.keep_ratios == [[1.0], [0.4, 0.4, 0.4]]
    losses, ratios = sandwich.hooks
    assert losses['losses'][0]['type'] == 'FeatureDistillation'
    assert (ratios['type'], ratios['sandwich']) == ('RandomKeepRatioHook', True)
    assert variants.operations('swin-det', None, larger.keep_ratios) == pytest.approx(1 / 1.25**2)
    assert (dense.keep_ratios, dense.method.scale) == (1.0, 1.25)
    assert len(plan) == 2 + 2 + 3  # what fits Swin alone is of Swin alone


def test_patterns_of_ratios():
    assert variants.spread(0.5, (1, 3)) == [[1.0], [0.5, 0.5, 0.5]]
    assert variants.spread(0.5, (1, 3), 'stage entry') == [[1.0], [0.5, 1.0, 1.0]]
    assert variants.spread(0.5, (2, 2), 'stage entry') == [[1.0, 0.5], [0.5, 1.0]]
    assert variants.spread(0.5, (2, 2, 1), 'stages 1 and 3') == [[1.0, 0.5], [1.0, 1.0], [0.5]]


def test_a_level_out_of_reach_is_named(shares):
    # Half a thousandth: Python 3.12 sums floats more exactly than 3.11.
    message = r'level=0\.9 .* evit on swin-det: .* 0\.001, saves 0\.(249|250) '
    with pytest.raises(UsageError, match=message):
        variants.level_ratios('swin-det', 'evit', 0.9)


@pytest.mark.parametrize('task', variants.TASKS)
def test_ratios_that_were_found_save_what_they_are_for(task):
    method, halves = 'evovit-found+distill', 'evovit-halves+distill'
    levels = [(method, level) for level in (0.33, 0.45)]
    levels += [(halves, level) for level in variants.FOUND_HALVES[task]]
    for name, level in levels:
        ratios = variants.level_ratios(task, name, level)
        share = variants.operations(task, variants.policy_of(task, name, level), ratios)
        assert 0.95 - level < share < 1.005 - level  # never dearer than what it stands beside
    with pytest.raises(UsageError, match=r'level=0\.2 .* allowed for .*: 0\.33, 0\.45'):
        variants.level_ratios(task, method, 0.2)
    for name in (method, halves):
        with pytest.raises(UsageError, match=f'{re.escape(name)} has ratios of its own'):
            list(variants.planned_runs((0,), (), (0.5,), (task,), (name,)))
    shipped, larger = f'{variants.TASKS[task].model}_recipe', 'retinanet_idle-swin_larger-images'
    if task == 'swin-det':
        assert ratios_of(larger) == variants.FOUND_HALVES[task][0.556]
        assert ratios_of(shipped) == (variants.FOUND[task][0.33], [[1.0, 1.0]] * 4)
    else:
        assert ratios_of(shipped) == variants.FOUND_HALVES[task][0.45]


def ratios_of(name):
    """Keep ratios and those of attention of a config."""
    cfg = Config.fromfile(variants.CONFIGS / 'policies' / f'{name}_digits.py').model.backbone
    own = cfg.keep_ratios, cfg.policy.get('attention_ratios') or 1.0
    kept, attending = (normalize_keep_ratios(r, (2, 2, 2, 2), nothing=True) for r in own)
    return kept, attending


def test_bisection_stops_at_the_nearest_step():
    assert variants.nearest_ratio(lambda ratio: round(1000 * ratio), 670) == 0.67
    assert variants.nearest_ratio(lambda ratio: round(1000 * ratio), 1) == 0.001

    def windows(ratio):
        return max(1, round(4 * ratio)) / 4

    assert windows(variants.nearest_ratio(windows, 0.6)) == 0.5
    assert windows(variants.nearest_ratio(windows, 0.66)) == 0.75


def test_levels_of_the_study_are_reached():
    for task, method, level, ratio in (
        ('swin-det', 'idlevit', 0.33, 0.594),
        ('swin-det', 'evit', 0.33, 0.52),
    ):
        ratios = variants.level_ratios(task, method, level)
        assert ratios[0] == [1.0, ratio]
        share = variants.operations(task, variants.METHODS[method].policy, ratios)
        assert share == pytest.approx(1 - level, abs=0.005)


def test_the_config_of_a_run(tmp_path):
    method = variants.METHODS['idlevit+distill']._replace(scale=1.5)
    ratios = [[1.0, 0.5]] * 4
    one = variants.Run(dict(method='x'), 5, dict(type='EvoViT'), ratios, method)
    base = run.load_config(variants.TASKS['swin-det'].config('finetune'))
    checkpoint = tmp_path / 'dense.pth'
    run.dumped(run.run_config(one, base, checkpoint, 3), tmp_path / 'new' / 'run.py')
    cfg = Config.fromfile(tmp_path / 'new' / 'run.py')
    assert cfg.model.backbone.policy == dict(type='EvoViT')  # nothing of the base's is left
    assert cfg.model.backbone.keep_ratios == ratios
    assert cfg.load_from == cfg.custom_hooks[-1].losses[0].teacher.checkpoint == str(checkpoint)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        steps = [step['type'] for step in loader.dataset.pipeline]
        assert steps[-2:] == ['Resize', 'PackDetInputs']
        assert loader.dataset.pipeline[-2].scale_factor == 1.5
    assert cfg.randomness.seed == 5
    assert cfg.train_cfg.max_epochs == cfg.train_cfg.val_interval == 3
    assert cfg.default_hooks.checkpoint.save_optimizer is False
    assert [schedule.end for schedule in cfg.param_scheduler] == [50, 3]
    assert base.train_cfg.max_epochs == 2  # untouched
    for task in variants.TASKS.values():
        assert task.config('dense').is_file()
        assert task.config('finetune').is_file()


SCORERS = [
    *('--tasks', 'swin-det', '--methods', 'idlevit', 'random', 'windows'),
    *('--levels', '--keep-ratios', '0.5'),
]


def test_study_at_equal_keep_ratios(study, tmp_path, capsys):
    text, calls = study(*SCORERS)
    assert len(calls) == 2 * 4
    assert 'about 0 min left' in capsys.readouterr().out
    rows = cells(text)
    assert rows[1] == ['dense', '–', '1', '1.000', '65.00', '–', '65.00, 65.00']
    half = ['0.5 from block 1', '0.625', '60.00', '-5.00 ± 0.00', '60.00, 60.00']
    assert rows[2] == ['idlevit', '–', *half]
    assert [row[0] for row in rows[3:]] == ['windows', 'random']
    assert str(tmp_path) not in text  # no folder of this machine
    assert study(*SCORERS) == (text, [])  # nothing is done again

    file = tmp_path / 'out' / 'runs.jsonl'
    file.write_text(''.join(file.read_text().splitlines(keepends=True)[:-1]))
    again, calls = study(*SCORERS)
    assert (again, len(calls)) == (text, 1)
    assert len(report.lines_of(file)) == 8
    # Another checkpoint: other runs.
    (tmp_path / 'work' / 'retinanet_idle-swin_dense_digits' / 'epoch_12.pth').write_bytes(b'other')
    assert len(study(*SCORERS)[1]) == 8


def test_study_of_many_ratios(study):
    options = ['--tasks', 'swin-det', '--levels', '0.2', '--seeds', '3']
    text, calls = study(*options, '--methods', 'idlevit', 'random', 'idlevit-sandwich')
    trained = [name for tool, name, *_ in calls if tool == 'tools/train.py']
    assert trained.count('swin-det-idlevit-sandwich-seed3.py') == 1
    tests = [arguments for tool, *arguments in calls if tool == 'tools/test.py']
    assert [arguments[-1] for arguments in tests] == [
        f'model.backbone.keep_ratios=[[1.0],[{ratio},{ratio},{ratio}]]'
        for ratio in variants.SERVED_RATIOS
    ]
    rows = cells(text)
    assert rows[2][:4] == ['idlevit', '-20 %', '0.733 from block 1', '0.800']
    assert rows[3][0] == 'random'
    assert rows[3][4:] == ['50.00', '-15.00', '50.00']
    assert rows[-5:] == [
        [ratio, share, '-5.00']
        for ratio, share in (
            *(('1', '1.000'), ('0.8', '0.850'), ('0.6', '0.700')),
            *(('0.5', '0.625'), ('0.4', '0.550')),
        )
    ]


def test_a_failure_keeps_what_was_done(study, monkeypatch, tmp_path):
    call = run.call

    def broken(folder, threads, tool, config, *arguments):
        if 'random' in folder.name:
            raise UsageError(f'{tool} failed for {folder.name}')
        call(folder, threads, tool, config, *arguments)

    monkeypatch.setattr(run, 'call', broken)
    message = 'tools/train.py failed for swin-det-random-keep_ratio0_5-seed0'
    with pytest.raises(UsageError, match=message):
        study(*SCORERS, '--jobs', '1')
    assert len(report.lines_of(tmp_path / 'out' / 'runs.jsonl')) == 2
    monkeypatch.setattr(run, 'call', call)
    assert len(study(*SCORERS)[1]) == 6


def test_a_tool_that_fails_is_named_with_its_last_line(tmp_path):
    script = tmp_path / 'tool.py'
    script.write_text(r'raise SystemExit("first\nthe reason")')
    with pytest.raises(
        UsageError, match=r'tool.py failed for run: the reason \(the whole log: .*\)'
    ):
        run.call(tmp_path / 'run', 1, script)
    with pytest.raises(UsageError, match='no mIoU in the logs'):
        run.last_score(tmp_path / 'run', 'mIoU')


@pytest.mark.parametrize(
    'options',
    [['--levels', '1'], ['--keep-ratios', '0'], ['--epochs', '0'], ['--methods', 'none']],
    ids=lambda options: options[0],
)
def test_wrong_arguments_before_anything_runs(study, options, capsys):
    with pytest.raises(SystemExit):
        study(*options)
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize('name', ['scorers', 'policies', 'one_frame'])
def test_committed_runs_give_the_committed_tables(name, shares, tmp_path):
    """All but multiply-adds, which are counted anew, and times, which are in the report alone."""
    folder = ROOT / 'docs' / 'studies'
    frame = report.frame_of(report.lines_of(folder / f'{name}.jsonl'))
    found = cells(report.text(frame))
    wanted = cells((folder / f'{name}.md').read_text())
    for own, committed in zip(found, wanted, strict=True):
        count = 1 if own[0] in ('keep', '1', '0.8', '0.6', '0.5', '0.4') else 3
        del own[count], committed[count]
        own[:] = [re.sub(r' \(.*\)', '', cell) for cell in own]
        committed[:] = [re.sub(r' \(.*\)', '', cell) for cell in committed[: len(own)]]
    assert sorted(found) == sorted(wanted)  # rows of equal means may stand in another order
    if name == 'policies':
        report.draw(frame, tmp_path / 'new' / 'figure.png')
        assert (tmp_path / 'new' / 'figure.png').stat().st_size > 20_000
