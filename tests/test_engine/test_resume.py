"""A run that is interrupted and resumed equals one that is not."""

from pathlib import Path

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from toy import toy_runner

from idlevit_mm.engine import load_checkpoint
from idlevit_mm.engine.checks import find_resumable
from idlevit_mm.hooks import AtomicCheckpointHook, ExactResumeHook


class Interrupted(Exception):
    """Stands in for a kill."""


class Interrupt(Hook):
    priority = 'LOWEST'

    def __init__(self, iteration=None, validation=None):
        self.iteration, self.validation = iteration, validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            raise Interrupted

    def before_val_epoch(self, runner):
        if runner.iter == self.validation:
            raise Interrupted


class Losses(Hook):
    def __init__(self):
        self.values = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values[runner.iter] = outputs['loss'].item()


def interrupted_then_resumed(work_dir, at, **settings):
    before, after = Losses(), Losses()
    with pytest.raises(Interrupted):
        toy_runner(work_dir, hooks=[before, at], **settings).train()
    checkpoint, _ = find_resumable(work_dir)
    runner = toy_runner(work_dir, hooks=[after], load_from=checkpoint, resume=True, **settings)
    # Another process would be in another state.
    torch.manual_seed(12345)
    runner.train()
    return runner, before.values, after.values


def final_state(work_dir):
    path, passed_over = find_resumable(work_dir)
    assert not passed_over
    checkpoint = load_checkpoint(path)
    return checkpoint, {
        name: (list(buffer.data[0]), list(buffer.data[1]))
        for name, buffer in checkpoint['message_hub']['log_scalars'].items()
        if 'time' not in name
    }


@pytest.mark.parametrize(
    ('by_epoch', 'workers', 'iteration'),
    [(True, 0, 5), (True, 2, 8), (False, 0, 8), (False, 2, 6)],
)
def test_resumed_run_equals_uninterrupted(tmp_path, by_epoch, workers, iteration):
    losses = Losses()
    settings = dict(by_epoch=by_epoch, workers=workers)
    toy_runner(tmp_path / 'whole', hooks=[losses], **settings).train()
    _, before, after = interrupted_then_resumed(
        tmp_path / 'parts', Interrupt(iteration=iteration), **settings
    )

    assert min(after) > 0, 'the run began anew'
    assert {**before, **after} == losses.values
    assert all(before[i] == after[i] for i in before.keys() & after.keys())
    whole, whole_log = final_state(tmp_path / 'whole')
    parts, parts_log = final_state(tmp_path / 'parts')
    assert whole_log == parts_log
    assert whole['param_schedulers'] == parts['param_schedulers']
    for name, value in whole['state_dict'].items():
        assert torch.equal(value, parts['state_dict'][name]), name
    for index, state in whole['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(value, parts['optimizer']['state'][index][name])


def test_iterations_over_a_finite_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    losses, settings = Losses(), dict(by_epoch=False, sampler='DefaultSampler')
    toy_runner(tmp_path / 'whole', hooks=[losses], **settings).train()
    _, before, after = interrupted_then_resumed(
        tmp_path / 'parts', Interrupt(iteration=9), **settings
    )
    assert min(after) == 8
    assert {**before, **after} == losses.values


def test_numbers_do_not_depend_on_workers(tmp_path):
    losses = []
    for workers in (0, 2):
        losses.append(Losses())
        toy_runner(tmp_path / str(workers), hooks=[losses[-1]], workers=workers).train()
    assert losses[0].values == losses[1].values


def test_numbers_depend_on_seed_and_iteration(tmp_path):
    one, other = Losses(), Losses()
    toy_runner(tmp_path / 'one', hooks=[one], seed=0).train()
    toy_runner(tmp_path / 'other', hooks=[other], seed=1).train()
    assert one.values != other.values
    assert len(set(one.values.values())) == len(one.values)


@pytest.mark.parametrize('by_epoch', [True, False])
def test_validation_that_was_killed_is_made_up_for(tmp_path, by_epoch):
    end = 12 if by_epoch else 10
    toy_runner(tmp_path / 'whole', by_epoch=by_epoch).train()
    runner, _, after = interrupted_then_resumed(
        tmp_path / 'parts', Interrupt(validation=end), by_epoch=by_epoch
    )
    assert not after, 'the training had ended'
    whole = toy_runner(
        tmp_path / 'whole',
        by_epoch=by_epoch,
        load_from=find_resumable(tmp_path / 'whole')[0],
        resume=True,
    )
    whole.train()
    expected = whole.message_hub.get_scalar('val/toy/acc').data[0]
    assert list(runner.message_hub.get_scalar('val/toy/acc').data[0]) == list(expected)


def test_finished_validation_is_not_repeated(tmp_path):
    # The best score was found, so the checkpoint was written again after validating.
    toy_runner(tmp_path, checkpoint=dict(save_best='toy/acc', rule='greater')).train()
    checkpoint = load_checkpoint(tmp_path / 'epoch_2.pth')
    assert checkpoint['message_hub']['runtime_info'][ExactResumeHook.RECORD] == 6
    runner = toy_runner(tmp_path, load_from=str(tmp_path / 'epoch_2.pth'), resume=True)
    validations = []

    class Count(Hook):
        def before_val_epoch(self, runner):
            validations.append(runner.iter)

    runner.register_hook(Count())
    runner.train()
    assert validations == [12]


class HalfWritten(LocalBackend):
    """Is killed while it writes."""

    def put(self, obj, filepath):
        super().put(obj[: len(obj) // 2], filepath)
        raise Interrupted


@pytest.mark.parametrize('keep', [1, -1])
def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, keep):
    settings = dict(checkpoint=dict(max_keep_ckpts=keep))

    class SaveBadly(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 2:
                monkeypatch.setattr(
                    'mmengine.runner.checkpoint.get_file_backend', lambda *a, **k: HalfWritten()
                )
                monkeypatch.setattr(
                    'mmengine.runner.checkpoint.FileClient.infer_client',
                    lambda *a, **k: HalfWritten(),
                )

    with pytest.raises(Interrupted):
        toy_runner(tmp_path, hooks=[SaveBadly()], **settings).train()
    monkeypatch.undo()
    assert not (tmp_path / 'epoch_3.pth').exists()
    path, passed_over = find_resumable(tmp_path)
    assert Path(path).name == 'epoch_2.pth'
    assert not passed_over

    toy_runner(tmp_path, load_from=path, resume=True, **settings).train()
    kept = sorted(p.name for p in tmp_path.glob('*.pth'))
    assert kept == [f'epoch_{n}.pth' for n in range(max(1, 5 - keep) if keep > 0 else 1, 5)]
    assert not list(tmp_path.glob('.*.part'))
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_4.pth')


@pytest.mark.parametrize(('counts', 'warned'), [(2, True), (3, False)])
def test_gradient_accumulation_across_a_checkpoint_is_warned_of(tmp_path, counts, warned):
    optim = dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=counts)
    runner = toy_runner(tmp_path, optim_wrapper=optim)
    runner.train()
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert ('accumulative_counts=2' in log) == warned


def test_other_checkpoint_hooks_are_left_alone(tmp_path):
    assert any(isinstance(h, AtomicCheckpointHook) for h in toy_runner(tmp_path).hooks)
    none = toy_runner(tmp_path, default_hooks=dict(checkpoint=None))
    assert not any(isinstance(h, AtomicCheckpointHook) for h in none.hooks)


def test_built_data_loaders_are_taken_as_they_are(tmp_path):
    from toy import ToyData

    loader = torch.utils.data.DataLoader(ToyData(), batch_size=3)
    runner = toy_runner(tmp_path, train_dataloader=loader)
    runner.train()
    assert runner.train_dataloader is loader
