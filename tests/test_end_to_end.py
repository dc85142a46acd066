"""The tools on a tiny data set: train, kill, resume, test; for detection and for segmentation."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from digit_scenes import write_digit_scenes

from idlevit_mm.engine import load_checkpoint

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked'),
]

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'

# A SIGKILL that always comes in the middle of the same iteration.
KILLER = """
import os, signal
import mmengine.runner.runner as module
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

module.collect_env = dict  # it starts compilers to log their versions

@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if os.environ.get('KILL_AT') == str(runner.iter + 1):
            os.kill(os.getpid(), signal.SIGKILL)
"""

# The shipped configs, made small and made random: only then is there something to resume exactly.
COMMON = """
custom_imports = dict(imports=['idlevit_mm', 'kill_hook'], allow_failed_imports=False)
custom_hooks = [dict(type='KillHook')]
# Visualisers are global by name, and those of a quick Python are there already.
visualizer = dict(name='of its own')
data_root = '{data}'
train_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers={workers} > 0,
    dataset=dict(data_root=data_root, pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', {load}),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
        dict(type='Pack{kind}Inputs'),
    ]),
)
val_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root)
)
test_dataloader = val_dataloader
"""
DETECTION = """
_base_ = '{root}/configs/digit_scenes/retinanet_idle-swin_digits.py'
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=3, val_interval=3)
default_hooks = dict(logger=dict(interval=1))
model = dict(backbone=dict(drop_path_rate=0.2), test_cfg=dict(score_thr=0.0))
"""
SEGMENTATION = """
_base_ = '{root}/configs/digit_scenes/fpn_idle-pvtv2_digits.py'
train_dataloader.update(sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=8, val_interval=4)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=3),
    logger=dict(interval=1, log_metric_by_epoch=False),
)
param_scheduler = [dict(type='PolyLR', eta_min=1e-5, begin=0, end=8, by_epoch=False)]
log_processor = dict(by_epoch=False)
model = dict(backbone=dict(drop_path_rate=0.2))
"""


def write_config(path, text, workers, **values):
    common = COMMON.replace('{workers}', str(workers))
    base, rest = text.strip().split('\n', 1)
    text = '\n'.join([base, common, rest])
    for name, value in {**values, 'root': ROOT}.items():
        text = text.replace(f'{{{name}}}', str(value))
    path.write_text(text)
    return path


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Folder with the data, the hook and a config per task."""
    folder = tmp_path_factory.mktemp('e2e')
    write_digit_scenes(
        folder / 'digit_scenes',
        layouts=('coco', 'ade'),
        size=(64, 64),
        num_train=12,
        num_val=4,
        seed=0,
        num_digits=(1, 3),
        digit_scale=(16, 32),
        progress=False,
    )
    (folder / 'kill_hook.py').write_text(KILLER)
    data = folder / 'digit_scenes'
    write_config(
        folder / 'det.py', DETECTION, 1, data=data / 'coco', load='with_bbox=True', kind='Det'
    )
    write_config(
        folder / 'seg.py',
        SEGMENTATION,
        0,
        data=data / 'ade',
        load='reduce_zero_label=True',
        kind='Seg',
    )
    return folder


def call(python, folder, tool, *arguments, **environment):
    """Run a tool by the command line: exit status and output."""
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', **environment)
    env['PYTHONPATH'] = os.pathsep.join([str(folder), env.get('PYTHONPATH', '')])
    command = [python, TOOLS / tool, *map(str, arguments)]
    # Not a pipe: workers that load data hold it open for a while when the tool is killed.
    with tempfile.TemporaryFile('w+') as output:
        result = subprocess.run(
            command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT, timeout=900
        )
        output.seek(0)
        return result.returncode, output.read()


def curve(work_dir):
    """Losses, learning rates and scores of every step, over all starts of a run."""
    steps = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = {k: v for k, v in json.loads(line).items() if 'time' not in k}
            step = (entry.get('epoch'), entry.get('step'), 'loss' in entry)
            assert steps.setdefault(step, entry) == entry
    return steps


CASES = {
    # Whether a new Python resumes, kill at, resume from, final checkpoint, name of the score.
    'det': (True, '5', 'epoch_1.pth', 'epoch_3.pth', 'coco/bbox_mAP'),
    'seg': (False, '6', 'iter_4.pth', 'iter_8.pth', 'mIoU'),
}


@pytest.mark.parametrize('task', CASES)
def test_train_kill_resume_test(place, quick_python, task):
    other, kill_at, resumed_from, final, score = CASES[task]
    config = place / f'{task}.py'
    whole, parts = place / f'{task}_whole', place / f'{task}_parts'

    run = partial(call, quick_python, place)
    code, output = run('train.py', config, '--work-dir', whole)
    assert code == 0, output[-4000:]
    code, output = run('train.py', config, '--work-dir', parts, KILL_AT=kill_at)
    assert code == -signal.SIGKILL, output[-4000:]
    assert (parts / 'last_checkpoint').read_text() == str(parts / resumed_from)
    resume = ('train.py', config, '--work-dir', parts, '--resume')
    code, output = call(sys.executable, place, *resume) if other else run(*resume)
    assert code == 0, output[-4000:]
    assert f'Resuming from {parts / resumed_from}' in output

    one, two = load_checkpoint(whole / final), load_checkpoint(parts / final)
    assert one['state_dict'].keys() == two['state_dict'].keys()
    for name, value in one['state_dict'].items():
        assert torch.equal(value, two['state_dict'][name]), name
    for index, state in one['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(value, two['optimizer']['state'][index][name])
    steps = curve(whole)
    assert curve(parts) == steps
    assert len({entry['loss'] for entry in steps.values() if 'loss' in entry}) > 5

    out = place / ('predictions.pkl' if task == 'det' else 'labels')
    folders = '--work-dir', place / f'{task}_test', '--show-dir', place / f'{task}_shown'
    code, output = run('test.py', config, parts / final, '--out', out, *folders)
    assert code == 0, output[-4000:]
    assert out.is_file() if task == 'det' else len(list(out.glob('*.png'))) == 4
    assert len(list((place / f'{task}_shown').iterdir())) == 4
    (report,) = (place / f'{task}_test').glob('*/*.json')
    tested = json.loads(report.read_text())[score]
    (validated,) = {
        entry[score]
        for (_, step, _), entry in steps.items()
        if score in entry and step == max(s for _, s, loss in steps if not loss)
    }
    assert tested == validated


def test_user_errors_on_the_command_line(place, quick_python):
    code, output = call(quick_python, place, 'train.py', place / 'nowhere.py')
    assert code == 2
    assert f'error: config {place / "nowhere.py"} does not exist\n' in output
    assert 'Traceback' not in output
