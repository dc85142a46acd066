"""A disk that is full, over quota or read-only costs a checkpoint, not the training."""

import errno
import logging
import os
import resource
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import runner as runner_module
from ranks import WRAPPERS, run_ranks
from toy import toy_runner

from idlevit_mm.engine import load_checkpoint
from idlevit_mm.engine.checks import find_resumable
from idlevit_mm.errors import CheckpointError

FULL, QUOTA, READ_ONLY = errno.ENOSPC, errno.EDQUOT, errno.EROFS


@pytest.fixture
def full_disk(monkeypatch):
    """Makes writing of some checkpoints fail after the first half of their bytes."""

    def fill(code, *fails):
        original = runner_module.save_checkpoint

        def save(checkpoint, filename, *args, **kwargs):
            original(checkpoint, filename, *args, **kwargs)
            if any(part in os.path.basename(filename) for part in fails):
                os.truncate(filename, os.path.getsize(filename) // 2)
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(runner_module, 'save_checkpoint', save)

    return fill


def logged(runner):
    return next(Path(runner.log_dir).glob('*.log')).read_text()


def names(work_dir):
    return sorted(p.name for p in work_dir.iterdir() if p.suffix in ('.pth', '.part'))


@pytest.mark.parametrize(('code', 'keep'), [(FULL, 1), (QUOTA, 2), (READ_ONLY, -1)])
def test_training_goes_on_without_a_checkpoint(tmp_path, full_disk, code, keep):
    full_disk(code, 'epoch_2.', 'epoch_3.')
    runner = toy_runner(tmp_path, checkpoint=dict(max_keep_ckpts=keep))
    states = {}

    class Look(Hook):
        priority = 'LOWEST'

        def after_train_epoch(self, runner):
            states[runner.epoch + 1] = names(tmp_path), (tmp_path / 'last_checkpoint').read_text()

    runner.register_hook(Look())
    runner.train()
    for epoch in (1, 2, 3):
        assert states[epoch] == (['epoch_1.pth'], str(tmp_path / 'epoch_1.pth'))
    assert names(tmp_path) == (['epoch_4.pth'] if keep == 1 else ['epoch_1.pth', 'epoch_4.pth'])
    errors = [line for line in logged(runner).splitlines() if 'ERROR' in line]
    assert len(errors) == 2
    assert all(os.strerror(code) in line and 'could not be written' in line for line in errors)
    # The last one knows of no checkpoint that is not there.
    info = load_checkpoint(tmp_path / 'epoch_4.pth')['message_hub']['runtime_info']
    assert info['last_ckpt'] == str(tmp_path / 'epoch_4.pth')
    if keep > 0:
        assert info['keep_ckpt_ids'] == [4] if keep == 1 else [1, 4]


def test_a_training_without_its_last_checkpoint_ends_in_an_error(tmp_path, full_disk, monkeypatch):
    toy_runner(tmp_path / 'whole').train()
    full_disk(FULL, 'epoch_3.', 'epoch_4.')
    with pytest.raises(CheckpointError, match=r'last checkpoint could not.*No space.*epoch_2\.pth'):
        toy_runner(tmp_path / 'full').train()
    monkeypatch.undo()
    monkeypatch.setattr(runner_module, 'collect_env', dict)
    path, passed_over = find_resumable(tmp_path / 'full')
    assert (Path(path).name, passed_over) == ('epoch_2.pth', [])
    toy_runner(tmp_path / 'full', load_from=path, resume=True).train()
    states = [
        load_checkpoint(tmp_path / d / 'epoch_4.pth')['state_dict'] for d in ('whole', 'full')
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def full_on_rank(rank, work_dir, wrapper):
    """Message of the error at the end, and what the hook of this process believes."""
    original = runner_module.save_checkpoint

    def save(checkpoint, filename, *args, **kwargs):
        original(checkpoint, filename, *args, **kwargs)
        if os.path.basename(filename).startswith(('.epoch_4', '.best_toy_acc_epoch_4')):
            raise OSError(FULL, os.strerror(FULL))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, 'save_checkpoint', save)
        runner = toy_runner(
            work_dir,
            checkpoint=dict(max_keep_ckpts=1, save_best='toy/acc', rule='greater'),
            launcher='pytorch',
            cfg=dict(model_wrapper_cfg=WRAPPERS[wrapper]),
        )
        with pytest.raises(CheckpointError) as error:
            runner.train()
    info = runner.message_hub.runtime_info
    return str(error.value), {name: info[name] for name in ('last_ckpt', 'keep_ckpt_ids')}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_all_processes_know_that_a_checkpoint_is_missing(tmp_path, wrapper):
    work_dir = tmp_path / 'run'
    one, other = run_ranks(tmp_path / 'meet', full_on_rank, work_dir, wrapper)
    assert one == other
    assert f'The newest one is: {work_dir}/epoch_3.pth' in one[0]
    assert one[1] == dict(last_ckpt=f'{work_dir}/epoch_3.pth', keep_ckpt_ids=[3])
    assert names(work_dir) == ['best_toy_acc_epoch_2.pth', 'epoch_3.pth']


def test_no_checkpoint_at_all(tmp_path, full_disk):
    full_disk(FULL, 'epoch_')
    with pytest.raises(CheckpointError, match='newest one is: None'):
        toy_runner(tmp_path).train()
    assert names(tmp_path) == []
    assert find_resumable(tmp_path) == (None, [])


@pytest.mark.parametrize('scores', [['toy/acc'], ['toy/acc', 'toy/other']])
def test_the_best_checkpoint_survives_a_better_one_that_cannot_be_written(
    tmp_path, full_disk, monkeypatch, scores
):
    from toy import ToyMetric

    values = iter([0.2, 0.5, 0.3, 0.4])
    monkeypatch.setattr(
        ToyMetric,
        'compute_metrics',
        lambda self, results: dict.fromkeys(('acc', 'other'), next(values)),
    )
    full_disk(FULL, 'best_toy_acc_epoch_2', 'best_toy_acc_epoch_3')
    changes = dict(
        checkpoint=dict(save_best=scores, rule='greater'),
        train_cfg=dict(by_epoch=True, max_epochs=4, val_interval=1),
    )
    runner = toy_runner(tmp_path, **changes)
    runner.train()
    best = {name for name in names(tmp_path) if name.startswith('best')}
    # Epoch 2 could not be written, so that 3 is the best of those that are there, and then 4.
    expected = {'best_toy_acc_epoch_4.pth'}
    if len(scores) == 2:
        # The second score was not reached in epochs 2 and 3.
        expected.add('best_toy_other_epoch_4.pth')
    assert best == expected
    suffix = '' if len(scores) == 1 else '_toy/acc'
    assert runner.message_hub.get_info(f'best_score{suffix}') == 0.4
    assert logged(runner).count('could not be written') == 2


def test_the_last_best_checkpoint_counts(tmp_path, full_disk):
    full_disk(FULL, 'best_')
    with pytest.raises(CheckpointError, match=r'epoch_4\.pth, but one with a better score'):
        toy_runner(tmp_path, checkpoint=dict(save_best='toy/acc', rule='greater')).train()
    assert names(tmp_path)[-1] == 'epoch_4.pth'


def test_the_system_refuses_to_write_on(tmp_path):
    """No stand-in: the kernel ends the write in the middle of the file."""

    class Limit(Hook):
        def before_train_epoch(self, runner):
            size = 2000 if runner.epoch == 2 else resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        runner = toy_runner(
            tmp_path,
            hooks=[Limit()],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1), logger=None),
        )
        runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ['epoch_1.pth', 'epoch_2.pth', 'epoch_4.pth']
    assert runner.message_hub.get_info('last_ckpt') == str(tmp_path / 'epoch_4.pth')


def test_logs_on_a_full_disk(tmp_path, capsys):
    class Fill(Hook):
        def before_train(self, runner):
            for handler in runner.logger.handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.setStream(open('/dev/full', 'w'))  # noqa: SIM115 (the handler's)
            scalars = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
            scalars.parent.mkdir(parents=True, exist_ok=True)
            scalars.symlink_to('/dev/full')

    visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
    runner = toy_runner(tmp_path, hooks=[Fill()], visualizer=visualizer)
    runner.train()
    assert (tmp_path / 'epoch_4.pth').is_file()
    output, errors = capsys.readouterr()
    assert output.count('The log cannot be written and lacks an entry: [Errno 28]') > 1
    assert errors.count('cannot be written: [Errno 28]') == 1
    assert 'Traceback' not in errors


def test_rubbish_of_a_killed_run_is_cleared(tmp_path):
    (tmp_path / '.epoch_7.pth.part').write_bytes(b'half')
    toy_runner(tmp_path).train()
    assert not list(tmp_path.glob('.*.part'))
