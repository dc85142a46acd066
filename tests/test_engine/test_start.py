"""What has to agree before a training starts: its place, its checkpoint, all its processes."""

import multiprocessing
import os
import re
import socket
import time

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from ranks import run_ranks
from test_scale_out import free_port
from toy import ToyData, toy_runner

from idlevit_mm.engine import processes, start
from idlevit_mm.engine.faults import naming_the_remedy
from idlevit_mm.errors import SettingError, UsageError

FORK = multiprocessing.get_context('fork')


def in_another_process(function, *arguments):
    """What a function says in a process of its own, which then ends without tidying up."""
    receiving, sending = FORK.Pipe(duplex=False)

    def run():
        try:
            sending.send(function(*arguments))
        except UsageError as error:
            sending.send(error)
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    answer = receiving.recv()
    process.join()
    return answer


def hold(folder):
    start.locked(folder).__enter__()
    return f'process {os.getpid()} on {socket.gethostname()}'


# ------------------------------------------------------------------------------ one at a time


def test_a_second_training_is_kept_out_of_a_work_dir(tmp_path):
    with start.locked(tmp_path):
        with start.locked(tmp_path):
            pass  # the tool has it, and then the runner
        error = in_another_process(hold, tmp_path)
        assert isinstance(error, UsageError)
        assert f'work dir {tmp_path} has a training in it already' in str(error)
        assert f'process {os.getpid()} on {socket.gethostname()}' in str(error)
        assert '--work-dir' in str(error)
        assert not isinstance(in_another_process(hold, tmp_path / '..'), UsageError)
    assert not list(tmp_path.iterdir())


def test_a_lock_is_free_when_its_process_is_gone(tmp_path):
    in_another_process(hold, tmp_path)
    with start.locked(tmp_path):
        pass


def test_the_lock_of_another_host_counts_while_it_is_touched(tmp_path, monkeypatch):
    (tmp_path / '.training.lock').write_text('elsewhere 7')
    with pytest.raises(UsageError, match=r'process 7 on elsewhere.*wait 300 s or delete .*lock'):
        hold(tmp_path)
    old = time.time() - 301
    os.utime(tmp_path / '.training.lock', (old, old))
    with start.locked(tmp_path):
        assert 'elsewhere' not in (tmp_path / '.training.lock').read_text()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError('no locks available')

    monkeypatch.setattr(start.fcntl, 'lockf', refuse)
    (tmp_path / '.training.lock').write_text(f'{socket.gethostname()} {os.getppid()}')
    with pytest.raises(UsageError, match=f'process {os.getppid()}'):
        hold(tmp_path)
    (tmp_path / '.training.lock').write_text(f'{socket.gethostname()} 4194999')
    with start.locked(tmp_path):
        pass


def test_runners_lock_their_work_dirs(tmp_path):
    class Look(Hook):
        def before_train_epoch(self, runner):
            answers.append(in_another_process(hold, tmp_path))

    answers = []
    toy_runner(tmp_path, hooks=[Look()], train_cfg=dict(by_epoch=True, max_epochs=1)).train()
    assert isinstance(answers[0], UsageError)
    assert not (tmp_path / '.training.lock').exists()


# ------------------------------------------------------------------------------------ resuming


def test_runners_resume_from_the_newest_whole_checkpoint(tmp_path):
    toy_runner(tmp_path).train()
    (tmp_path / 'epoch_4.pth').write_bytes(b'PK')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    runner = toy_runner(tmp_path, resume=True)
    seen = []

    class Look(Hook):
        def before_train_epoch(self, runner):
            seen.append(runner.epoch)

    runner.register_hook(Look())
    runner.train()
    assert seen == [3]


@pytest.mark.parametrize(
    ('optim_wrapper', 'message'),
    [
        (dict(optimizer=dict(type='SGD', lr=0.1)), 'another optimizer than SGD.*no dampening'),
        (dict(optimizer=dict(type='Adadelta')), 'another optimizer than Adadelta.*no rho'),
        (
            dict(
                optimizer=dict(type='AdamW', lr=0.1),
                paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=0.1))),
            ),
            'cannot be resumed with this config.*parameter group',
        ),
    ],
)
def test_the_state_of_another_optimizer_is_one_line(tmp_path, optim_wrapper, message):
    toy_runner(tmp_path).train()
    path = str(tmp_path / 'epoch_2.pth')
    runner = toy_runner(tmp_path, load_from=path, resume=True, optim_wrapper=optim_wrapper)
    with pytest.raises(SettingError, match=message) as error:
        runner.train()
    assert f'load_from={path}' in str(error.value)
    assert '\n' not in str(error.value)


def test_an_optimizer_with_the_same_state_is_taken(tmp_path):
    toy_runner(tmp_path).train()
    adam = dict(optimizer=dict(type='Adam', lr=0.1))
    path = str(tmp_path / 'epoch_2.pth')
    toy_runner(tmp_path, load_from=path, resume=True, optim_wrapper=adam).train()


def test_other_settings_are_said_in_one_line():
    def config(**changes):
        cfg = Config(
            dict(
                model=dict(backbone=dict(keep_ratios=0.7, policy=dict(type='A'))),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
                train_dataloader=dict(batch_size=2, num_workers=2),
                work_dir='a',
            )
        )
        cfg.merge_from_dict(changes)
        return cfg.pretty_text

    def said(**changes):
        return start.other_settings(dict(meta=dict(cfg=config())), config(**changes))

    assert said() is None
    assert said(**{'work_dir': 'b', 'train_dataloader.num_workers': 4}) is None
    line = said(
        **{
            'model.backbone.keep_ratios': [0.5, 0.6],
            'model.backbone.policy.type': 'B',
            'optim_wrapper.optimizer.lr': 0.2,
            'train_dataloader.batch_size': 4,
        }
    )
    assert '\n' not in line
    for text in (
        'model.backbone.keep_ratios is [0.5, 0.6], was 0.7 (as in the config',
        'model.backbone.policy.type is B, was A (as in the config',
        'optim_wrapper.optimizer.lr is 0.2, was 0.1 (as in the checkpoint',
        'train_dataloader.batch_size is 4, was 2 (as in the config',
    ):
        assert text in line
    for meta in ({}, dict(cfg=3), dict(cfg='exec('), dict(config='a = open("x")')):
        assert start.other_settings(dict(meta=meta), config()) is None


# ----------------------------------------------------------------------------------- processes


def test_places_that_cannot_be(monkeypatch):
    for rank, world, message in [
        ('2', '2', 'RANK=2 with WORLD_SIZE=2; allowed: 0 to 1'),
        ('-1', '2', "RANK='-1' must be a whole number from 0 on"),
        ('x', '2', "RANK='x' must be"),
        ('0', '0', "WORLD_SIZE='0' must be a whole number from 1 on"),
        ('0', '', "WORLD_SIZE='' must be"),
    ]:
        told = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK='0', MASTER_ADDR='localhost')
        for name, value in dict(told, MASTER_PORT='1').items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=message):
            processes.place_process('pytorch')


@pytest.mark.parametrize('number', [0, 1])
def test_processes_that_do_not_meet(monkeypatch, number):
    told = dict(RANK=number, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    cfg = Config(dict(launcher='pytorch', env_cfg=dict(dist_cfg=dict(meeting_timeout=1))))
    error = in_another_process(processes.open_group, cfg)
    assert isinstance(error, UsageError)
    for text in ('WORLD_SIZE=2 processes did not meet', f'RANK={number}', 'meeting_timeout'):
        assert text in str(error)


def meet_alone(rank, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.destroy_process_group()
    cfg = Config(dict(launcher='pytorch'))
    processes.open_group(cfg)
    group = torch.distributed.group.WORLD._get_backend(torch.device('cpu'))
    return group.options._timeout.total_seconds(), torch.distributed.get_world_size()


def test_processes_meet_and_then_wait_ten_minutes_for_progress(tmp_path):
    assert run_ranks(tmp_path, meet_alone, free_port()) == [(600.0, 2)] * 2


CONFIGS = [
    (dict(train_cfg=dict(max_epochs=3)), 'train_cfg.max_epochs is 2 in process 0 and 3 in'),
    (dict(train_dataloader=dict(batch_size=4)), 'train_dataloader.batch_size is 2'),
    (dict(model=dict(keep_ratios=[0.5, 0.6])), r'model.keep_ratios.1 is 0.7 .* and 0.6'),
    (dict(randomness=dict(seed=1)), 'randomness.seed is 0'),
    (dict(extra=1), r'extra is \(none\) in process 0 and 1'),
]


def compared(rank, changes):
    base = dict(
        train_cfg=dict(max_epochs=2),
        train_dataloader=dict(batch_size=2, dataset=dict(data_root='/scratch/0', type=ToyData)),
        model=dict(keep_ratios=[0.5, 0.7]),
        randomness=dict(seed=0),
        work_dir='a',
    )
    said = []
    for change in changes:
        cfg = Config(base)
        if rank:
            cfg.merge_from_dict({'work_dir': 'b', 'train_dataloader.dataset.data_root': '/mnt/1'})
            cfg.merge_from_dict(change)
        try:
            start.check_same_config(cfg)
            said.append(None)
        except UsageError as error:
            said.append(str(error))
    return said


def test_processes_with_different_configs_name_the_first_key(tmp_path):
    one, other = run_ranks(tmp_path, compared, [{}, *(changes for changes, _ in CONFIGS)])
    assert one == other
    assert one[0] is None, 'places may differ'
    for said, (_, message) in zip(one[1:], CONFIGS, strict=True):
        assert re.search(message, said)


# -------------------------------------------------------------------------------------- faults


class Silent(ToyData):
    """Its worker never hands out a batch, as one without room in /dev/shm."""

    def __getitem__(self, index):
        time.sleep(30)


def test_a_batch_that_never_comes_ends_the_training(tmp_path):
    loader = dict(
        dataset=Silent(),
        sampler=dict(type='DefaultSampler'),
        batch_size=1,
        num_workers=1,
        timeout=1,
    )
    with pytest.raises(UsageError, match=r'no batch was loaded.*/dev/shm.*timeout=SECONDS'):
        naming_the_remedy(toy_runner(tmp_path, train_dataloader=loader).train)


def test_loaders_wait_ten_minutes_and_keep_signals_from_their_workers(tmp_path):
    runner = toy_runner(tmp_path, workers=1)
    runner.build_train_loop(runner._train_loop)
    loader = runner.build_train_loop(runner._train_loop).dataloader
    assert loader.timeout == 600


SAID = [
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '), 'num_workers'),
    (RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly'), 'num_workers'),
    (RuntimeError('unable to open shared memory object </torch_7> in read-write mode'), '/dev/shm'),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes"), 'memory'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), 'batch_size'),
    (MemoryError(), 'batch_size'),
    (OSError(12, 'Cannot allocate memory'), 'batch_size'),
    (OSError(24, 'Too many open files'), 'ulimit -n'),
    (RuntimeError('received 0 items of ancdata'), 'ulimit -n'),
    (OSError(28, 'No space left on device'), 'disk is full'),
]


def fail(fault):
    raise fault


def test_faults_of_the_machine_say_what_to_do(subtests):
    for fault, remedy in SAID:
        with subtests.test(str(fault)):
            with pytest.raises(UsageError, match=remedy) as error:
                naming_the_remedy(lambda fault=fault: fail(fault))
            assert '--resume' in str(error.value)
            assert '\n' not in str(error.value)
    with pytest.raises(RuntimeError, match='shape mismatch') as error:
        naming_the_remedy(lambda: fail(RuntimeError('shape mismatch')))
    assert not isinstance(error.value, UsageError)
