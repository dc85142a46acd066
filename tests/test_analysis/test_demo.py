"""The demo's table, its memory and its steps, without training."""

import json

import pytest
from rich.console import Console

from idlevit_mm.analysis import demo, runs
from idlevit_mm.analysis.demo import TASKS, Cost, Memory, Outcome
from idlevit_mm.analysis.latency import Spread

SPREAD = Spread(0.8, 0.75, 0.85)


def _outcome(task, quality):
    costs = tuple(
        Cost(part, Spread(12.34, 12.0, 13.0), SPREAD, Spread(0.7, 0.6, 0.8), 82_000_000, 0.731)
        for part in ('backbone, 128×128', 'whole model, 128×128')
    )
    return Outcome(task, quality, 0.6999, costs, 150.0)


@pytest.fixture
def console():
    return Console(width=100, record=True, force_terminal=False, quiet=False)


def test_one_table_for_all_models():
    outcomes = [_outcome(TASKS[0], 0.7123), _outcome(TASKS[1], 0.655)]
    rows = {cells[0]: cells[1:] for cells in demo.table_rows(outcomes)}
    assert rows['quality'] == ['box AP 0.712', 'mIoU 0.655']
    assert rows['tokens kept'] == ['70 %', '70 %']
    assert rows['  multiply-adds'][0] == '82 M, 0.73 × dense'
    assert rows['  time / keep 1'][0] == '0.80 (0.75–0.85)'
    assert rows['  time / mmdet'][1] == '0.70 (0.60–0.80)'
    assert rows['training'] == ['2.5 min', '2.5 min']
    markdown = demo.markdown_table(outcomes).splitlines()
    assert all(line.count('|') == 4 for line in markdown)
    assert len(markdown) == 2 + len(demo.table_rows(outcomes))


def test_results_are_written(tmp_path):
    demo.write_results([_outcome(task, 0.7) for task in TASKS], tmp_path)
    record = json.loads((tmp_path / 'results.json').read_text())
    assert [item['quality'] for item in record['outcomes']] == [0.7, 0.7]
    assert record['outcomes'][0]['costs'][0]['operation_ratio'] == 0.731
    assert '| quality | box AP 0.700 | mIoU 0.700 |' in (tmp_path / 'results.md').read_text()


def _run(monkeypatch, tmp_path, console, qualities):
    monkeypatch.setattr(demo, 'write_data', lambda *_: None)
    monkeypatch.setattr(
        demo,
        'run_task',
        lambda task, *_: (_outcome(task, qualities[task]), [tmp_path / f'{task.config}.png']),
    )
    good = demo.run_demo(tmp_path / 'demo', tmp_path / 'data', console=console)
    return good, console.export_text()


def test_good_models(monkeypatch, tmp_path, console):
    good, text = _run(monkeypatch, tmp_path, console, dict.fromkeys(TASKS, 0.61))
    assert good
    assert 'below the expected' not in text
    assert 'retinanet_idle-swin_digits.png' in text.replace('\n', '')


def test_a_bad_model_is_named(monkeypatch, tmp_path, console):
    qualities = {TASKS[0]: 0.61, TASKS[1]: 0.599}
    good, text = _run(monkeypatch, tmp_path, console, qualities)
    assert not good
    assert f'{TASKS[1].name}: mIoU 0.599 is below the expected 0.60.' in text
    assert f'{TASKS[0].name}: box AP' not in text


def test_percent():
    assert demo.quality_of(TASKS[0], {'coco/bbox_mAP': 0.68}) == 0.68
    assert demo.quality_of(TASKS[1], {'mIoU': 68.0}) == 0.68


def test_memory(tmp_path):
    path = tmp_path / 'demo.json'
    memory = Memory(path, {'config': 'a'})
    assert not memory.changed
    assert memory.get('train') is None
    memory.put('train', {'seconds': 3})
    again = Memory(path, {'config': 'a'})
    assert again.get('train') == {'seconds': 3}
    other = Memory(path, {'config': 'b'})
    assert other.changed
    assert other.get('train') is None


def test_forget_leaves_other_files_alone(tmp_path):
    (tmp_path / TASKS[0].config).mkdir()
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'mine.txt').touch()
    (tmp_path / 'results.md').touch()
    demo.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


class _Tool:
    """Stands in for tools/train.py and tools/test.py."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(runs, 'run_tool', self)

    def __call__(self, arguments, log, *, threads=None, on_line=None):
        arguments = [str(argument) for argument in arguments]
        self.calls.append(arguments)
        folder = log.parent
        if arguments[0] == 'tools/train.py':
            on_line('Epoch(train) [1][ 50/125]  lr: 1  eta: 0:01:08  time: 0.5  loss: 1.5')
            folder.mkdir(exist_ok=True)
            (folder / 'epoch_1.pth').touch()
            (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
        else:
            (folder / 'test' / '1').mkdir(parents=True)
            (folder / 'test' / '1' / '1.json').write_text('{"coco/bbox_mAP": 0.68}')


def test_steps_are_done_once_and_resumed(monkeypatch, tmp_path, console):
    from mmengine.config import Config

    tool = _Tool(monkeypatch)
    cfg = Config(dict(train_cfg=dict(max_epochs=2)))
    config, folder = tmp_path / 'c.py', tmp_path / 'run'
    options = {'a.b': 1}

    def steps():
        memory = Memory(folder / 'demo.json', {})
        checkpoint = demo.train(TASKS[0], cfg, config, folder, options, memory, console)
        return demo.test(TASKS[0], config, checkpoint, folder, options, memory, console)

    assert steps() == {'coco/bbox_mAP': 0.68}
    train, test = tool.calls
    assert '--resume' not in train
    assert train[-2:] == test[-2:] == ['--cfg-options', 'a.b=1']
    assert 'epoch 1/2  50/125  loss 1.500  eta 0:01:08' in console.export_text(clear=False)

    tool.calls.clear()
    assert steps() == {'coco/bbox_mAP': 0.68}
    assert tool.calls == []

    # Killed during the training: a checkpoint is there, but the step is not marked as done.
    (folder / 'demo.json').unlink()
    monkeypatch.setattr(runs, 'last_metrics', lambda _: {})
    monkeypatch.setattr(
        _Tool, '__call__', lambda self, arguments, *_, **__: self.calls.append(arguments)
    )
    with pytest.raises(runs.RunFailed, match='coco/bbox_mAP'):
        steps()
    assert '--resume' in tool.calls[0]


def test_data_options_only_for_another_folder(tmp_path):
    from mmengine.config import Config

    cfg = Config(dict(val_evaluator=dict(ann_file='data/digit_scenes/coco/a.json')))
    assert demo.data_options(cfg, runs.REPOSITORY / 'data' / 'digit_scenes') == {}
    moved = demo.data_options(cfg, tmp_path)
    assert moved == {'val_evaluator.ann_file': f'{tmp_path.resolve()}/coco/a.json'}
