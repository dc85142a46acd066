"""The launchers, with real processes: several machines, Slurm, and a process that is killed."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from idlevit_mm.engine import launch, load_checkpoint

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'

PARTS = """
import os, signal
import mmengine.runner.runner as module
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from toy import ToyData, ToyMetric, ToyModel

module.collect_env = dict  # it starts compilers to log their versions
DATASETS.register_module(module=ToyData)
METRICS.register_module(module=ToyMetric)

@MODELS.register_module()
class ToyNet(ToyModel):
    def __init__(self, decode_head):
        super().__init__()

@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if os.environ.get('KILL') == f'{runner.rank} at {runner.iter + 1}':
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get('STOP') == f'{runner.rank} at {runner.iter + 1}':
            os.kill(os.getpid(), signal.SIGTERM)
        if os.environ.get('FAULT') == f'{runner.rank}':
            raise ValueError('a fault')
"""
# A model with a head for segmentation, which is what tools/test.py wants to know.
CONFIG = """
custom_imports = dict(imports=['idlevit_mm', 'toy_parts'], allow_failed_imports=False)
default_scope = 'mmengine'
model = dict(type='ToyNet', decode_head=dict())
train_dataloader = dict(
    dataset=dict(type='ToyData', size=12),
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_size=2,
    num_workers=0,
)
val_dataloader = dict(
    dataset=dict(type='ToyData', size=5),
    sampler=dict(type='DefaultSampler', shuffle=False),
    batch_size=2,
    num_workers=0,
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='ToyMetric')
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=2)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
custom_hooks = [dict(type='KillHook')]
randomness = dict(seed=0)
"""
# Starts tasks as srun does, and ends the others if one fails.
SRUN = """
import json, os, subprocess, sys, time
arguments = sys.argv[1:]
start = next(i for i, text in enumerate(arguments) if 'python' in os.path.basename(text))
options = arguments[:start]
with open(os.environ['SRUN_LOG'], 'w') as file:
    json.dump(arguments, file)
tasks = int(next(o for o in options if o.startswith('--ntasks=')).split('=')[1])
shared = dict(SLURM_NTASKS=str(tasks), SLURM_NODELIST='localhost', SLURM_JOB_ID=os.environ['JOB'])
processes = [
    subprocess.Popen(
        arguments[start:],
        env=dict(os.environ, SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **shared),
    )
    for task in range(tasks)
]
while any(process.poll() is None for process in processes):
    failed = [process for process in processes if process.poll()]
    for process in processes if failed else ():
        process.kill()
    time.sleep(0.1)
sys.exit(max(abs(process.returncode) for process in processes))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def place(tmp_path_factory, quick_python):
    """Folder with a config, what it imports, a Python and an srun."""
    folder = tmp_path_factory.mktemp('scale')
    (folder / 'toy_parts.py').write_text(PARTS)
    (folder / 'toy_config.py').write_text(CONFIG)
    (folder / 'bin').mkdir()
    (folder / 'bin' / 'python').symlink_to(quick_python)
    srun = folder / 'bin' / 'srun'
    srun.write_text(f'#!{sys.executable}\n{SRUN}')
    srun.chmod(0o755)
    return folder


def start(place, tool, *arguments, **environment):
    """Start a shell tool; its output goes to a pipe."""
    environment = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHON': str(place / 'bin' / 'python'),
        'PYTHON_EXEC': str(place / 'bin' / 'python'),  # what torchrun starts
        'PYTHONPATH': os.pathsep.join([str(place), str(Path(__file__).parent), str(ROOT)]),
        'PATH': os.pathsep.join([str(place / 'bin'), os.environ['PATH']]),
        'SRUN_LOG': str(place / 'srun.json'),
        'JOB': str(free_port()),
        'CUDA_VISIBLE_DEVICES': '',
        **{name: str(value) for name, value in environment.items()},
    }
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        if name not in environment or name in os.environ:
            environment.pop(name, None)
    return subprocess.Popen(
        ['bash', str(TOOLS / tool), *map(str, arguments)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-4000:]
    return output


def state(path):
    checkpoint = load_checkpoint(path)
    return {**checkpoint['state_dict'], **checkpoint['optimizer']['state'][0]}


@pytest.fixture(scope='module')
def runs(place):
    """Output of a training on two machines, and of one that was killed and then resumed."""
    machines = dict(NNODES=2, PORT=free_port())
    options = ('toy_config.py', 1, '--work-dir', 'whole')
    whole = [
        start(
            place, 'dist_train.sh', *options, **machines, NODE_RANK=number, MASTER_ADDR='127.0.0.1'
        )
        for number in (0, 1)
    ]
    output = dict(whole=[finish(process) for process in whole])
    begin = time.monotonic()
    output['killed'] = finish(
        start(
            place,
            'dist_train.sh',
            *('toy_config.py', 2, '--work-dir', 'parts'),
            PORT=free_port(),
            KILL='0 at 8',
        ),
        code=1,
    )
    output['seconds'] = time.monotonic() - begin
    output['left'] = sorted(p.name for p in (place / 'parts').iterdir() if p.suffix != '.py')
    output['resumed'] = finish(
        start(
            place,
            'slurm_train.sh',
            *('short', 'toy', 'toy_config.py', 'parts', '--resume'),
            GPUS=2,
            CPU_ONLY=1,
            SRUN_ARGS='--mem=1G --exclusive',
        )
    )
    output['srun'] = json.loads((place / 'srun.json').read_text())
    return output


pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='gloo between processes')


@pytest.mark.e2e
def test_two_machines_train_together(place, runs):
    assert 'distributed on CPUs with the gloo backend' in runs['whole'][0]
    assert 'world_size' not in runs['whole'][1], 'only the first process logs'
    assert sorted(p.name for p in (place / 'whole').glob('epoch_*')) == [
        f'epoch_{epoch}.pth' for epoch in (1, 2, 3, 4)
    ]


@pytest.mark.e2e
def test_a_killed_process_ends_the_job_and_is_named(place, runs):
    cause = runs['killed'].partition('Root Cause')[2]
    assert re.search(r'time +: \d{4}-\d\d-\d\d_\d\d:\d\d:\d\d\n.*\n +rank +: 0 ', cause)
    assert re.search(r'exitcode +: -9 .*\n.*\n +traceback : Signal 9 \(SIGKILL\)', cause)
    assert runs['seconds'] < 60, 'the other one waits for it'
    work_dir = [name for name in runs['left'] if not name.startswith(('20', '.training'))]
    assert work_dir == ['epoch_1.pth', 'epoch_2.pth', 'last_checkpoint']


@pytest.mark.e2e
def test_a_fault_ends_the_job_and_is_named(place):
    options = ('toy_config.py', 2, '--work-dir', 'faulty')
    output = finish(start(place, 'dist_train.sh', *options, PORT=free_port(), FAULT=1), code=1)
    cause = output.partition('Root Cause')[2]
    assert re.search(r'rank +: 1 ', cause)
    assert 'traceback : Traceback' in cause
    assert cause.index('in after_train_iter') < cause.index('ValueError: a fault')


@pytest.mark.e2e
def test_a_signal_to_one_process_stops_the_job_with_a_checkpoint(place, runs):
    options = ('toy_config.py', 2, '--work-dir', 'stopped')
    output = finish(start(place, 'dist_train.sh', *options, PORT=free_port(), STOP='1 at 8'), 1)
    assert f'checkpoint is {place}/stopped/iter_8.pth. Start the same command again' in output
    assert re.search(r'exitcode +: 143 ', output)
    finish(start(place, 'dist_train.sh', *options, '--resume', PORT=free_port()))
    one, two = state(place / 'whole' / 'epoch_4.pth'), state(place / 'stopped' / 'epoch_4.pth')
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.e2e
def test_slurm_resumes_what_was_killed(place, runs):
    assert f'Resuming from {place}/parts/epoch_2.pth' in runs['resumed']
    assert runs['resumed'].count('Resuming from') == 1
    one, two = state(place / 'whole' / 'epoch_4.pth'), state(place / 'parts' / 'epoch_4.pth')
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert runs['srun'][:8] == [
        *('-p', 'short', '--job-name=toy', '--ntasks=2', '--ntasks-per-node=2'),
        *('--cpus-per-task=5', '--kill-on-bad-exit=1', '--mem=1G'),
    ]
    assert runs['srun'][-5:] == ['--work-dir', 'parts', '--resume', '--launcher', 'slurm']


@pytest.mark.e2e
def test_testing_by_both_launchers(place, runs):
    checkpoint = 'whole/epoch_4.pth'
    processes = [
        start(
            place,
            'dist_test.sh',
            *('toy_config.py', checkpoint, 2, '--work-dir', 'tested_0'),
            PORT=free_port(),
        ),
        start(
            place,
            'slurm_test.sh',
            *('short', 'toy', 'toy_config.py', checkpoint, '--work-dir', 'tested_1'),
            # As many processes: what the toy data draws depends on their number.
            GPUS=2,
            GPUS_PER_NODE=1,
        ),
    ]
    for process in processes:
        finish(process)
    scores = [json.loads(path.read_text())['toy/acc'] for path in place.glob('tested_*/*/*.json')]
    assert len(scores) == 2
    assert scores[0] == scores[1]
    options = json.loads((place / 'srun.json').read_text())
    assert '--gres=gpu:1' in options
    assert '--ntasks=2' in options
    assert '--ntasks-per-node=1' in options


# ------------------------------------------------------------------------- what can be said before

USAGE = [
    ('dist_train.sh', ['c.py'], {}, r'usage: .*dist_train\.sh CONFIG PROCESSES'),
    ('dist_test.sh', ['c.py', 'c.pth'], {}, r'usage: .*dist_test\.sh CONFIG CHECKPOINT PROC'),
    ('slurm_train.sh', ['short'], {}, r'usage: .*slurm_train\.sh PARTITION'),
    ('slurm_test.sh', ['short'], {}, r'usage: .*slurm_test\.sh PARTITION'),
    ('slurm_train.sh', ['p', 'j', 'c', 'w'], dict(GPUS='x'), "GPUS='x' must be a whole number"),
    ('dist_train.sh', ['c.py', '0'], {}, "PROCESSES='0' must be a whole number from 1 on"),
    ('dist_train.sh', ['c.py', ''], {}, "PROCESSES='' must be a whole number from 1 on"),
    ('dist_test.sh', ['c.py', 'c.pth', 'two'], {}, "PROCESSES='two' must be a whole number"),
    ('dist_train.sh', ['c.py', '2'], dict(NNODES='0'), "NNODES='0' must be a whole number"),
    ('dist_train.sh', ['c.py', '2'], dict(NNODES='2'), 'NNODES=2 needs MASTER_ADDR'),
    ('dist_train.sh', ['c.py', '2'], dict(NODE_RANK='1'), "NODE_RANK='1' must be .* NNODES=1"),
    ('slurm_train.sh', [*'pjcw'], dict(PATH='/usr/bin:/bin'), 'there is no srun on this machine'),
]


def test_usage_errors_are_one_line(place):
    for tool, arguments, environment, message in USAGE:
        output = finish(start(place, tool, *arguments, **environment), code=2)
        assert re.fullmatch(f'error: .*{message}.*\n', output)


def lose_the_other(rank, folder):
    if rank == 1:
        os._exit(9)
    launch._WAIT_FOR_OTHERS = 0
    sys.stderr = open(folder / 'said', 'w')  # noqa: SIM115 (the process ends with it)
    launch.run_tool(lambda: torch.distributed.all_reduce(torch.ones(3)))


def test_a_process_says_that_it_lost_another(tmp_path):
    run_ranks(tmp_path, lose_the_other, tmp_path, codes=[1, 9])
    said = (tmp_path / 'said').read_text()
    assert said.startswith('error: process 0 of 2 lost the connection to another one')
    assert said.endswith('a training with --resume\n')
    assert said.count('\n') == 1
