"""Sweep and search on tiny models: figures are those of tools/test.py, nothing is done twice."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from idlevit_mm.analysis.flops import MultiplyAddCounter
from idlevit_mm.analysis.models import load_model
from idlevit_mm.engine.launch import evaluate_from_config
from idlevit_mm.errors import UsageError
from idlevit_mm.policies.schedule import normalize_keep_ratios

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
TOOLS = Path(__file__).parents[2] / 'tools'
SMALL = dict(embed_dims=8, num_layers=[1, 2, 1, 1], num_heads=[1, 1, 1, 1], mlp_ratios=[1] * 4)
DETECTOR, SEGMENTOR = 'retinanet_idle-pvtv2_digits', 'fpn_idle-pvtv2_digits'


@pytest.fixture(scope='module')
def nets(scene_config, tmp_path_factory):
    """Config and checkpoint of a tiny detector and segmentor, by name, and of a dense detector."""
    folder, found = tmp_path_factory.mktemp('nets'), {}
    for name in (DETECTOR, SEGMENTOR, 'dense'):
        cfg = scene_config(name if '_' in name else DETECTOR)
        cfg.model.neck.update(in_channels=[8, 8, 8, 8][-len(cfg.model.neck.in_channels) :])
        cfg.model.backbone.update(SMALL, init_cfg=None)
        if name == 'dense':
            cfg.model.backbone.type = 'PyramidVisionTransformerV2'
            for key in ('keep_ratios', 'policy'):
                cfg.model.backbone.pop(key, None)
        text = '\n'.join(f'{key} = {value!r}' for key, value in cfg.to_dict().items())
        (folder / f'{name}.py').write_text(text)
        torch.manual_seed(0)
        torch.save({'state_dict': load_model(cfg).state_dict()}, folder / f'{name}.pth')
        found[name] = folder / f'{name}.py', folder / f'{name}.pth'
    return found


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a tool: name and arguments to its exit code; what was tested meanwhile is in a list."""
    monkeypatch.syspath_prepend(TOOLS)
    trials, tested = importlib.import_module('trials'), []
    metrics = trials.Trials.metrics

    def watched(self, model):
        tested.append(model)
        return metrics(self, model)

    monkeypatch.setattr(trials.Trials, 'metrics', watched)

    def call(name, *arguments):
        tested.clear()
        options = ('--work-dir', tmp_path / 'work', '--device', 'cpu', '--rounds', '1')
        arguments = (*arguments, *options)
        return importlib.import_module(name).main([str(argument) for argument in arguments])

    call.tested = tested
    return call


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sweep(run, nets, tmp_path):
    config, checkpoint = nets[SEGMENTOR]
    out = tmp_path / 'new' / 'sweep.jsonl'
    what = (config, checkpoint, '--shape', '70x90', '--out', out, '--int8')
    assert run('sweep', *what, '--keep', '0.5', '--policies', 'configured', 'EvoViT') == 0
    lines = lines_of(out)
    found = {(line['policy'], line['keep'], line['int8']): line for line in lines}
    keys = itertools.product(('configured', 'EvoViT'), (1.0, 0.5), (False, True))
    assert set(found) == set(keys) - {('EvoViT', 1.0, False)}
    for keep in (1.0, 0.5):
        options = {'model.backbone.keep_ratios': keep}
        want = evaluate_from_config(
            str(config), str(checkpoint), str(tmp_path), cfg_options=options
        )
        assert found['configured', keep, False]['metrics'] == want
        assert found['configured', keep, False]['score'] == want['mIoU']
        assert found['configured', keep, True]['score'] == pytest.approx(want['mIoU'], abs=3)
    assert len({line['score'] for line in lines}) > 3
    dense, idle = found['configured', 1.0, False], found['configured', 0.5, False]
    assert dense['time'] == 1
    assert idle['multiply_adds'] < dense['multiply_adds']
    assert out.with_suffix('.png').is_file()
    assert out.with_suffix('.md').read_text().count('| EvoViT') == 3

    # Nothing is measured twice; another subset is another measurement.
    assert run('sweep', *what, '--keep', '0.5', '[1.0,0.5,1.0,0.7]', '--as-configured') == 0
    assert len(run.tested) == 4
    assert run('sweep', *what, '--keep', '0.5') == 0
    assert run.tested == []
    assert run('sweep', *what, '--keep', '0.5', '--num-images', '-2') == 0
    assert len(run.tested) == 4


def test_a_sweep_of_stages_on_some_images(run, nets, tmp_path):
    what = ('--shape', '64x64', '--part', 'backbone', '--per-stage', '--keep', '1.0', '0.5')
    assert run('sweep', *nets[DETECTOR], *what, '--num-images', '2') == 0
    lines = lines_of(tmp_path / 'work' / 'sweep.jsonl')
    tables = [[0.5 if at == stage else 1.0 for at in range(4)] for stage in range(4)]
    assert [line['keep'] for line in lines] == [1.0, *tables]
    assert [line['stage'] for line in lines] == [None, 0, 1, 2, 3]
    assert {line['score_name'] for line in lines} == {'coco/bbox_mAP'}
    assert (tmp_path / 'work' / 'sweep.png').is_file()


@pytest.mark.parametrize(('count', 'want'), [(2, [0, 1]), (-1, [2])])
def test_images_that_are_not_shown_are_not_missed(nets, tmp_path, count, want, run):
    trials = importlib.import_module('trials')
    parser = importlib.import_module('argparse').ArgumentParser()
    trials.add_options(parser)
    options = ['--num-images', count, '--work-dir', tmp_path, '--device', 'cpu']
    args = parser.parse_args([str(word) for word in (*nets[DETECTOR], *options)])
    loop = trials.Trials(args).runner.test_loop
    (metric,) = loop.evaluator.metrics
    infos = list(map(loop.dataloader.dataset.get_data_info, range(len(want))))
    assert metric.img_ids == [info['img_id'] for info in infos]
    names = [Path(info['img_path']).stem for info in infos]
    assert names == [f'{number:06d}' for number in want]


@pytest.mark.usefixtures('run')
def test_nothing_found_is_a_score_of_nought():
    score = importlib.import_module('trials').Trials.score
    trials = SimpleNamespace(args=SimpleNamespace(metric=None), counts='')
    with pytest.raises(UsageError, match='allowed: none, as the model finds nothing'):
        score(trials, {})
    assert score(trials, {'coco/bbox_mAP': 0.5}) == ('coco/bbox_mAP', 0.5)
    assert score(trials, {}) == ('coco/bbox_mAP', 0.0)
    with pytest.raises(UsageError, match='allowed: coco/bbox_mAP_50'):
        score(trials, {'coco/bbox_mAP_50': 0.5})


@pytest.fixture
def paced(monkeypatch):
    """Times are multiply-adds, and those of whole idle models so much more than their parts."""
    measures, more = importlib.import_module('measures'), [0.0]

    @torch.no_grad()
    def compare(calls, rounds, warmup, max_seconds, timer):
        counts = {name: (timer or measures.seconds_of)(call) for name, call in calls.items()}
        if 'own' in counts:
            counts['own'] += more[0] * (counts['dense'] - counts['own'])
        return {name: [count] * 3 for name, count in counts.items()}

    monkeypatch.setattr(measures, 'compare', compare)
    with MultiplyAddCounter() as counter:
        monkeypatch.setattr(measures, 'moment', lambda: counter.multiply_adds / 1e9)
        yield more


def best_of_all(lines, cap):
    """Least damage that schedules of a file do under a budget, by looking at all of them."""
    (costs,) = (line for line in lines if line['kind'] == 'costs')
    damage = [line['damage'] for line in lines if line['kind'] == 'damage']
    table = np.array(costs['units'][0])
    saved = (table - table[:, -1:]) / costs['whole'][0]
    rows = range(len(table))
    legal = (c for c in itertools.product(range(3), repeat=len(table)) if c[1] >= c[2])
    sums = [(1 + saved[rows, c].sum(), np.array(damage)[rows, c].sum()) for c in map(list, legal)]
    return min(done for cost, done in sums if cost <= cap)


def test_a_search(run, nets, tmp_path, paced, capsys):
    (config, checkpoint), out = nets[SEGMENTOR], tmp_path / 'found.py'
    what = (config, checkpoint, '--shape', '70x90', '--out', out, '--per', 'block', '--force')
    few = ('--part', 'backbone', '--ratios', '0.2', '0.6', '--spread', '1', '--candidates', '2')
    assert run('search', *what, *few, '--latency', '0.9x', '--trials', '2') == 0
    lines = lines_of(out.with_suffix('.jsonl'))
    checked = [line for line in lines if line['kind'] == 'checked']
    assert [line['name'] for line in checked] == ['keep 1', 'found', 'found', 'uniform', 'front']
    for line in checked[1:4]:
        assert line['predicted_cost'] == pytest.approx(line['operations'], rel=1e-3)
        assert line['time'] <= 0.9
    # The first that optuna tests is the best under the tables.
    assert min(line['predicted_damage'] for line in checked[1:3]) == best_of_all(lines, 0.9)
    assert '162 schedules' in capsys.readouterr().out
    best = max(checked[1:4], key=lambda line: line['score'])
    model = load_model(Config.fromfile(out), checkpoint)
    assert model.backbone.keep_ratios == normalize_keep_ratios(best['keep_ratios'], (1, 2, 1, 1))
    options = {'model.backbone.keep_ratios': best['keep_ratios']}
    want = evaluate_from_config(str(config), str(checkpoint), str(tmp_path), cfg_options=options)
    assert want['mIoU'] == best['score']
    assert out.with_suffix('.png').is_file()

    # What was measured is in the file. What misses the budget when it is timed is passed over.
    paced[0] = 0.3
    assert run('search', *what, *few, '--latency', '0.8x') == 0
    again = lines_of(out.with_suffix('.jsonl'))
    assert [line['kind'] for line in again].count('damage') == 5
    assert 'too much' in capsys.readouterr().out
    found = [line for line in again[len(lines) :] if line.get('name') == 'found']
    assert found
    assert all(line['time'] <= 0.8 for line in found)
    known = {json.dumps(line['keep_ratios']) for line in lines if line['kind'] == 'score'}
    new = [line for line in again[len(lines) :] if line['kind'] == 'score']
    assert len(run.tested) == len(new)
    assert not known & {json.dumps(line['keep_ratios']) for line in new}


@pytest.mark.parametrize(('proxy', 'few'), [('loss', ()), ('metric', (0.0, 0.2))])
def test_other_proxies_and_budgets(run, nets, tmp_path, proxy, few, capsys, paced):
    what = ('--proxy', proxy, '--shape', '64x64', '--ratios', '0.5', '--spread', '0')
    what += ('--part', 'backbone', '--candidates', '1')
    what += ('--attention', *map(str, few)) if few else ()
    other = ['--cfg-options', 'test_dataloader.batch_size=3', 'model.backbone.drop_rate=0.1']
    # Ratios of attention that a config has stay, where none are searched.
    other += [] if few else ['model.backbone.policy.attention_ratios=0.1']
    assert run('search', *nets[DETECTOR], *what, '--multiply-adds', '0.97x', *other) == 0
    lines = lines_of(tmp_path / 'work' / 'found.jsonl')
    # Which images a search looks at, and how, is not handed on; all else is.
    own, cfg = Config.fromfile(nets[DETECTOR][0]), Config.fromfile(tmp_path / 'work' / 'found.py')
    assert cfg.test_dataloader == own.test_dataloader
    assert cfg.model.backbone.drop_rate == 0.1
    damage = np.array([line['damage'] for line in lines if line['kind'] == 'damage'])
    assert damage.shape == (4, 2 + len(few))
    assert (damage[:, -1] == 0).all()
    checked = [line for line in lines if line['kind'] == 'checked']
    for line in checked[:2]:  # what lies between two ratios is another matter
        assert line['predicted_cost'] == pytest.approx(line['operations'], rel=0.05)
    best = checked[1]['keep_ratios']
    if few:
        model = load_model(cfg, nets[DETECTOR][1])
        own = [block.policy.attention_ratio for block in sum(model.backbone.idle_blocks, [])]
        assert own == sum(best['attention_ratios'], [])
        assert set(own) <= {*few, 1.0}
    assert proxy == 'metric' or damage.all(axis=0)[0]
    assert 'keep_ratios=' in capsys.readouterr().out


def test_ratios_of_attention_that_a_config_has_are_replaced(tmp_path):
    search = importlib.import_module('search')
    config = TOOLS.parent / 'configs/digit_scenes/policies/retinanet_idle-pvtv2_recipe_digits.py'
    keep = dict(keep_ratios=[[1.0, 0.5]] * 4, attention_ratios=[[1.0, 0.0], *[[0.0, 0.2]] * 3])
    args = SimpleNamespace(config=str(config), latency=None, multiply_adds='0.5x')
    out = tmp_path / 'found.py'
    search.write_config(args, keep, out, SimpleNamespace(cfg=Config.fromfile(config)))
    found = Config.fromfile(out).model.backbone
    assert found.keep_ratios == keep['keep_ratios']
    assert found.policy.type == 'EvoViT'
    assert found.policy.attention_ratios == keep['attention_ratios']


SWEEP, SEARCH = ('sweep', '--keep', '0.5'), ('search', '--multiply-adds', '0.9x')
SIZED = ('--shape', '64x64')


@pytest.mark.parametrize(
    ('net', 'arguments', 'message'),
    [
        (DETECTOR, ('sweep', '--keep', '0'), 'holds 0, which is not in (0, 1]'),
        (DETECTOR, ('sweep', '--keep', '1.2'), 'holds 1.2, which is not in (0, 1]'),
        (DETECTOR, ('sweep', '--keep', 'nan'), '--keep nan: allowed are'),
        (DETECTOR, (*SWEEP, '--policies', 'EvoVit'), "'EvoVit'"),
        (DETECTOR, (*SWEEP, '--policies', '{bad'), '--policies {bad: allowed are'),
        (DETECTOR, (*SWEEP, '--num-images', '0'), '--num-images 0: allowed are'),
        (DETECTOR, (*SWEEP, '--metric', 'mIoU', *SIZED), '--metric mIoU is not measured; allowed'),
        (DETECTOR, (*SWEEP, '--out', 'x.json'), 'x.json must end in .jsonl'),
        ((DETECTOR, SEGMENTOR), SWEEP, 'does not fit RetinaNet'),
        ((DETECTOR, 'none'), SWEEP, 'none.pth does not exist'),
        (('none', DETECTOR), SWEEP, 'none.py does not exist'),
        ('dense', SEARCH, 'PyramidVisionTransformerV2 is not an idle backbone'),
        (
            DETECTOR,
            (*SEARCH, '--cfg-options', 'test_dataloader.dataset.data_root=no'),
            'root no does',
        ),
        (DETECTOR, ('search', '--latency', '0.9'), '--latency 0.9: allowed are a share'),
        (DETECTOR, (*SEARCH, *SIZED, '--attention', '1.2'), '--attention holds 1.2, which is not'),
        (DETECTOR, (*SEARCH, '--ratios', '1.5', *SIZED), '1.5, which is not in (0, 1]'),
        (DETECTOR, (*SEARCH, '--candidates', '0'), '--candidates must be at least 1'),
        (
            DETECTOR,
            ('search', '--multiply-adds', '0.1x', *SIZED, '--ratios', '0.5'),
            '--multiply-adds 0.1x: no ratios meet it; the nearest are [0.5, 0.5, 0.5, 0.5]',
        ),
    ],
    ids=lambda part: ' '.join(part) if isinstance(part, tuple) else None,
)
def test_bad_input_is_one_line(run, nets, capsys, net, arguments, message, tmp_path):
    pair = (net, net) if isinstance(net, str) else net
    missing = (tmp_path / 'none.py', tmp_path / 'none.pth')
    paths = [nets.get(name, missing)[at] for at, name in enumerate(pair)]
    capsys.readouterr()
    assert run(arguments[0], *paths, *arguments[1:]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith('error: ')
    assert message in error.splitlines()[-1]


def test_a_package_that_is_missing_is_named(run, nets, monkeypatch, capsys):
    importlib.import_module('search')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert run('search', *nets[DETECTOR], '--latency', '0.9x', '--trials', '3') == 2
    assert 'pip install "idlevit_mm[search]"' in capsys.readouterr().err
