"""Starting tools and reading their logs."""

import json
import os
import sys
import time
from importlib import metadata

import pytest
from mmengine.config import Config, DictAction

from idlevit_mm.analysis import runs
from idlevit_mm.analysis.runs import Progress, RunFailed

EPOCH_LINE = (
    '11/20 13:23:16 - mmengine - INFO - Epoch(train) [2][ 50/125]  base_lr: 4.9e-05 lr: 4.9e-05  '
    'eta: 0:01:08  time: 0.58  data_time: 0.01  loss: 1.6546  loss_cls: 1.1290  loss_bbox: 0.52'
)
ITER_LINE = (
    '11/20 13:23:16 - mmengine - INFO - Iter(train) [  100/40000]  lr: 4.9e-05  '
    'eta: 1 day, 2:01:08  time: 0.58  loss: nan  decode.loss_ce: nan'
)


def test_progress_lines():
    assert Progress.of(EPOCH_LINE) == Progress(2, 50, 125, 1.6546, '0:01:08')
    progress = Progress.of(ITER_LINE)
    assert (progress.epoch, progress.step, progress.eta) == (None, 100, '1 day, 2:01:08')
    assert progress.loss != progress.loss
    assert Progress.of('11/20 - INFO - Epoch(val) [1][5/5]    eta: 0:00:00  time: 0.2270') is None


def test_options_survive_the_command_line():
    import argparse

    options = {'a.ratio': 0.5, 'a.list': [[1, 0.5], [0.25]], 'a.path': 'x/y.pth', 'a.flag': False}
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    parsed = parser.parse_args(runs.option_list(options)).cfg_options
    cfg = Config(dict(a=dict(ratio=1, list=[], path='', flag=True)))
    cfg.merge_from_dict(parsed)
    assert cfg.a.to_dict() == {
        'ratio': 0.5, 'list': [[1, 0.5], [0.25]], 'path': 'x/y.pth', 'flag': False,
    }  # fmt: skip
    assert runs.option_list({}) == []


def test_tool_output_goes_to_the_log_and_the_listener(tmp_path):
    script = tmp_path / 'tool.py'
    script.write_text('import os\nprint("threads", os.environ["OMP_NUM_THREADS"])\nprint("end")\n')
    seen = []
    runs.run_tool([script], tmp_path / 'a' / 'log.txt', threads=1, on_line=seen.append)
    assert seen == ['threads 1\n', 'end\n']
    assert (tmp_path / 'a' / 'log.txt').read_text().endswith('threads 1\nend\n')


def test_failing_tool_shows_the_end_of_its_log(tmp_path):
    script = tmp_path / 'tool.py'
    script.write_text('import sys\nprint("first")\nsys.exit("it went wrong")\n')
    with pytest.raises(RunFailed, match='status 1(?s:.*)it went wrong(?s:.*)log.txt'):
        runs.run_tool([script], tmp_path / 'log.txt')


def test_interrupted_tool_is_ended(tmp_path):
    script = tmp_path / 'tool.py'
    script.write_text('import os, time\nprint(os.getpid())\ntime.sleep(60)\n')
    started = []

    def interrupt(line):
        started.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run_tool([script], tmp_path / 'log.txt', on_line=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
    assert not runs._active


@pytest.mark.skipif(sys.platform != 'linux', reason='needs prctl')
def test_tool_does_not_outlive_a_killed_parent(tmp_path):
    import signal
    import subprocess

    tool = tmp_path / 'tool.py'
    tool.write_text('import os, time\nprint(os.getpid())\ntime.sleep(600)\n')
    log = tmp_path / 'log.txt'
    parent = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'import sys, pathlib; from idlevit_mm.analysis import runs\n'
            'runs.run_tool([sys.argv[1]], pathlib.Path(sys.argv[2]))',
            str(tool),
            str(log),
        ],
        cwd=runs.REPOSITORY,
    )
    for _ in range(2400):  # importing the package takes its time on a busy machine
        lines = log.read_text().splitlines() if log.is_file() else []
        if len(lines) == 2:
            break
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    child = int(lines[1])
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if _is_zombie(child):
            return
        time.sleep(0.05)
    pytest.fail(f'process {child} is still there')


def _is_zombie(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] == 'Z'
    except FileNotFoundError:
        return True


def _write_log(folder, *entries):
    path = folder / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(json.dumps(entry) for entry in entries) + '\n{"coco/bbox_m')


def test_newest_metrics_win(tmp_path):
    _write_log(tmp_path / '20260101_000000', {'loss': 1.0}, {'coco/bbox_mAP': 0.1, 'step': 1})
    _write_log(
        tmp_path / '20260102_000000',
        {'coco/bbox_mAP': 0.2, 'step': 1},
        {'loss': 1.0, 'step': 250},
        {'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.5, 'time': 0.1, 'data_time': 0.1, 'step': 2},
        {'loss': 1.0},
    )
    assert runs.last_metrics(tmp_path) == {'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.5}
    assert runs.last_metrics(tmp_path / 'nothing') == {}


def test_metrics_of_a_test_run(tmp_path):
    (tmp_path / '20260101_000000').mkdir()
    (tmp_path / '20260101_000000' / '20260101_000000.json').write_text('{"mIoU": 71.5}')
    assert runs.last_metrics(tmp_path) == {'mIoU': 71.5}


def test_latest_checkpoint(tmp_path):
    assert runs.latest_checkpoint(tmp_path) is None
    (tmp_path / 'epoch_2.pth').touch()
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text(str(tmp_path / 'epoch_2.pth'))
    assert runs.latest_checkpoint(tmp_path) == tmp_path / 'epoch_2.pth'
    pointer.write_text('/somewhere/else/epoch_2.pth')  # the folder was moved
    assert runs.latest_checkpoint(tmp_path) == tmp_path / 'epoch_2.pth'
    pointer.write_text('/somewhere/else/epoch_3.pth')
    assert runs.latest_checkpoint(tmp_path) is None


def test_data_folder_is_moved_everywhere():
    cfg = Config(
        dict(
            data_root='data/digits/coco/',
            train_dataloader=dict(dataset=dict(data_root='data/digits/coco/', ann_file='a.json')),
            val_dataloader=dict(dataset=dict(datasets=[dict(data_root='data/digits')])),
            test_dataloader=None,
            val_evaluator=dict(ann_file='data/digits/coco/a.json', other='data/digits2/a.json'),
        )
    )
    assert runs.data_root_options(cfg, 'data/digits/', '/new') == {
        'train_dataloader.dataset.data_root': '/new/coco/',
        'val_dataloader.dataset.datasets.0.data_root': '/new',
        'val_evaluator.ann_file': '/new/coco/a.json',
    }


def test_shown_paths_are_relative_inside_the_repository(tmp_path):
    assert runs.shown(runs.REPOSITORY / 'tools' / 'train.py') == 'tools/train.py'
    assert runs.shown(tmp_path) == str(tmp_path.resolve())


def test_versions_name_the_packages_that_are_installed():
    """The import names alone would leave open which stack was measured."""
    found = runs.versions().split(', ')
    for name in ('torch', 'mmengine'):
        for package in metadata.packages_distributions()[name]:
            assert f'{package} {metadata.version(package)}' in found
