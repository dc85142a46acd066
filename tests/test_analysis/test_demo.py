"""The demo's steps, its line of progress and its report, with stand-ins for the tools."""

import importlib.util
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from rich.console import Console

ROOT = Path(__file__).parents[2]
TRAINING = (
    '11/20 13:23:16 - mmengine - INFO - Epoch(train) [2][ 50/125]  base_lr: 4.9e-05 lr: 4.9e-05  '
    'eta: 0:01:08  time: 0.58  data_time: 0.01  loss: 1.6546  loss_cls: 1.1290  loss_bbox: 0.52\n'
)


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location('demo', ROOT / 'tools' / 'demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def console():
    return Console(width=200, record=True, force_terminal=False)


def _script(path, text):
    path.write_text(text)
    return f'python {path}'


def _words(command, key):
    """What follows an option, up to the next one."""
    rest = command.split()
    rest = rest[rest.index(key) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith('--')), len(rest))]


@pytest.mark.parametrize('story', ['detector', 'segmentor', 'trees'])
def test_dense_and_idle_get_the_same_training(demo, story):
    steps = demo.steps_of(demo.STORIES[story], 'w', '0.5', 'randomness.seed=1')
    steps = {step.title: step.commands for step in steps}
    ((first, training),) = steps['train dense'].items()
    dense, idle = steps['train on both'].values()
    assert _words(dense, '--cfg-options') == _words(idle, '--cfg-options')
    for command in (training, dense, idle):
        assert _words(command, '--cfg-options')[-1] == 'randomness.seed=1'
        assert '--resume' in command
    # They start from what the first training leaves, as does the idle config.
    assert f'load_from={first}' in dense.split()
    ((written, swap),) = steps['write the idle config'].items()
    assert _words(swap, '--load-from') == [first]
    assert _words(swap, '--out') == [written] == idle.split()[2:3]
    assert training.split()[2] == dense.split()[2] == swap.split()[2]


def test_tools_and_their_options_exist(demo):
    for story in demo.STORIES.values():
        for command in (own for step in demo.steps_of(story, 'w', '0.5') for own in step.left()):
            _, tool, *arguments = command.split()
            # The launcher hands all options on; those of training and testing stand beside both.
            text = (ROOT / tool.replace('dist_train.sh', 'train.py')).read_text()
            text += (ROOT / 'idlevit_mm' / 'engine' / 'launch.py').read_text()
            for option in (word for word in arguments if word.startswith('--')):
                assert f"'{option}'" in text, (tool, option)


@pytest.mark.parametrize('story', ['detector', 'segmentor', 'trees'])
def test_epochs_are_those_of_the_config(demo, story):
    story = demo.STORIES[story]
    cfg = Config.fromfile(ROOT / 'configs' / f'{story.config}.py')
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1]['end'] == story.epochs


def test_files_tell_what_is_done(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = demo.Step('test', 1, {'a/epoch_2.pth': 'train', 'a/test/*/*.json': 'test', '': 'look'})
    assert step.left() == ['train', 'test', 'look']
    (tmp_path / 'a' / 'test' / '1').mkdir(parents=True)
    (tmp_path / 'a' / 'epoch_2.pth').touch()
    assert step.left() == ['test', 'look']
    (tmp_path / 'a' / 'test' / '1' / '1.json').touch()
    assert step.left() == ['look']


def test_commands_of_a_step_run_side_by_side(demo, tmp_path, console, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 4)
    # Each waits for the other.
    text = (
        'import os, pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\n'
        'mine.touch()\nwhile not other.exists():\n    time.sleep(0.01)\n'
        'print("threads", os.environ["OMP_NUM_THREADS"])\n'
    )
    tool = _script(tmp_path / 'tool.py', text)
    a, b = tmp_path / 'a', tmp_path / 'b'
    step = demo.Step('wait for both', 1, {'a': f'{tool} {a} {b}', 'b': f'{tool} {b} {a}'})
    demo.Screen(console, [step]).run(step, tmp_path)
    for number in range(2):
        log = tmp_path / 'logs' / f'wait-for-both-{number}.log'
        assert log.read_text() == 'threads 2\n'


def test_a_failing_command_is_told_and_ends_the_others(demo, tmp_path, console):
    slow = _script(
        tmp_path / 'slow.py',
        f'import os, time\nopen({str(tmp_path / "id")!r}, "w").write(str(os.getpid()))\n'
        'time.sleep(60)\n',
    )
    text = (
        f'import os, sys, time\nwhile not os.path.exists({str(tmp_path / "id")!r}):\n'
        '    time.sleep(0.01)\ntime.sleep(0.1)\nsys.exit("it went wrong")\n'
    )
    step = demo.Step('try', 1, {'a': slow, 'b': _script(tmp_path / 'bad.py', text)})
    with pytest.raises(RuntimeError, match=r'try: status 1(?s:.*)try-1\.log(?s:.*)it went wrong'):
        demo.Screen(console, [step]).run(step, tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'id').read_text()), 0)


def test_time_left_is_that_of_the_slower_training_and_the_steps_after_it(demo, console):
    steps = [demo.Step('train', 100, {}), demo.Step('draw', 30, {})]
    screen = demo.Screen(console, steps)
    screen.left -= 100
    screen.said -= 20
    screen.show(steps[0], 5, [TRAINING, TRAINING.replace('0:01:08', '1:00:09')])
    text = console.export_text()
    assert 'train, about 60:39 left' in text
    assert 'epoch 2 50/125 loss 1.6546' in text
    # Nothing more within ten seconds, and from the step's own guess before logs tell something.
    screen.show(steps[0], 5, ['', TRAINING])
    assert console.export_text() == ''
    screen.said -= 20
    screen.show(steps[0], 5, ['', TRAINING])
    assert 'about 2:05 left' in console.export_text()


def test_report(demo, tmp_path, console):
    for kind, value in (('continued', 0.61), ('keep-0.5', 0.605)):
        (tmp_path / kind / 'test' / '1').mkdir(parents=True)
        record = json.dumps({'coco/bbox_mAP': value})
        (tmp_path / kind / 'test' / '1' / '1.json').write_text(record)
    for part in ('backbone', 'model'):
        times = [{'kind': 'host', 'ms': 20.0}, {'kind': 'dense', 'ms': 10.0}]
        times.append({'kind': 'config', 'ms': 7.5})
        case = {'part': part, 'shape': [512, 640], 'batch': 1, 'candidates': times}
        lines = [{'machine': 'some processor', 'versions': 'torch 2'}, case]
        (tmp_path / 'keep-0.5' / f'{part}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    console.print(*demo.report(demo.STORIES['detector'], tmp_path, '0.5'), sep='\n')
    text = console.export_text()
    assert 'box AP: dense 61.0, idle 60.5 (-0.5 points)' in text
    row = r'\| model, 512×640 +\| +20\.0 \| +10\.0 \| +7\.5 \| +0\.75 \| +0\.38 \|'
    assert re.search(row, text)
    assert 'some processor; torch 2' in ' '.join(text.split())


def test_the_same_command_goes_on(demo, tmp_path, monkeypatch, capsys):
    seen = []

    def interrupted(screen, step, work):
        seen.append(step.title)
        if step.title == 'test and draw':
            raise KeyboardInterrupt
        for name in filter(None, step.commands):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    monkeypatch.setattr(demo, 'ROOT', tmp_path)
    monkeypatch.setattr(demo.Screen, 'run', interrupted)
    monkeypatch.setattr(sys, 'argv', ['demo.py'])
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.main() == 130
        assert 'goes on from here' in capsys.readouterr().out
        assert seen[1:] == [
            *('train dense', 'write the idle config', 'train on both', 'test and draw')
        ]
        seen.clear()
        assert demo.main() == 130
        assert seen == ['write data', 'test and draw']
    finally:
        signal.signal(signal.SIGTERM, handler)
