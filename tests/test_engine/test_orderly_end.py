"""Signals and divergence end a training in order, and nothing good is lost."""

import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from ranks import WRAPPERS, run_ranks
from test_resume import Losses, final_state
from toy import ToyMetric, ToyModel, toy_runner

from idlevit_mm.engine import load_checkpoint
from idlevit_mm.engine.checks import find_resumable
from idlevit_mm.errors import CheckpointError, DivergenceError
from idlevit_mm.hooks import OrderlyEndHook


class Signal(Hook):
    """Sends this process a signal while it is in an iteration, or in a validation."""

    priority = 'VERY_HIGH'

    def __init__(self, number, iteration=None, validation=None):
        self.number, self.iteration, self.validation = number, iteration, validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), self.number)

    def before_val_epoch(self, runner):
        if runner.iter == self.validation:
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def _heeded():
    """As in a terminal: what a script starts in the background ignores SIGINT, or SIGHUP."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped(work_dir, at, **settings):
    """Losses until a signal, and the exit code."""
    losses = Losses()
    with pytest.raises(SystemExit) as exit_:
        toy_runner(work_dir, hooks=[losses, at], **settings).train()
    assert exit_.value.code == 128 + at.number
    return losses.values


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'])
def test_a_signal_ends_a_training_with_a_checkpoint(tmp_path, capsys, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    losses = stopped(tmp_path, Signal(number, iteration=2))
    assert list(losses) == [0, 1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'{name}: stopped after iteration 2')
    assert f'{tmp_path}/iter_2.pth' in line
    assert '--resume' in line
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ('by_epoch', 'workers', 'iteration', 'validation'),
    [
        (True, 0, 2, None),
        (True, 2, 8, None),
        (True, 0, 6, None),
        (True, 0, None, 6),
        (True, 0, None, 12),
        (False, 0, 7, None),
        (False, 2, 4, None),
        (False, 0, None, 8),
    ],
)
def test_what_goes_on_after_a_signal_equals_what_was_not_interrupted(
    tmp_path, by_epoch, workers, iteration, validation
):
    settings = dict(
        by_epoch=by_epoch,
        workers=workers,
        checkpoint=dict(max_keep_ckpts=-1 if workers else 1, save_best='toy/acc', rule='less'),
    )
    whole = Losses()
    toy_runner(tmp_path / 'whole', hooks=[whole], **settings).train()
    at = Signal(signal.SIGTERM, iteration, validation)
    before = stopped(tmp_path / 'parts', at, **settings)
    checkpoint, passed_over = find_resumable(tmp_path / 'parts')
    assert not passed_over
    after = Losses()
    torch.manual_seed(12345)
    toy_runner(
        tmp_path / 'parts', hooks=[after], load_from=checkpoint, resume=True, **settings
    ).train()
    assert not before.keys() & after.values.keys(), 'nothing is repeated'
    assert before | after.values == whole.values
    states = [final_state(tmp_path / name) for name in ('whole', 'parts')]
    assert states[0][1] == states[1][1]
    for name, value in states[0][0]['state_dict'].items():
        assert torch.equal(value, states[1][0]['state_dict'][name])
    files = [sorted(p.name for p in (tmp_path / d).glob('*.pth')) for d in ('whole', 'parts')]
    assert files[0] == files[1]
    info = states[1][0]['message_hub']['runtime_info']
    assert not info.get('interim_ckpt')
    assert not info.get('batches_of_the_epoch')


def test_a_training_that_is_stopped_again_and_again_has_one_checkpoint_more(tmp_path):
    stopped(tmp_path, Signal(signal.SIGTERM, 4))
    for iteration in (5, 8):
        at = Signal(signal.SIGTERM, iteration)
        stopped(tmp_path, at, resume=True, load_from=find_resumable(tmp_path)[0])
    files = sorted(path.name for path in tmp_path.glob('*.pth'))
    assert files == ['epoch_1.pth', 'epoch_2.pth', 'iter_8.pth']


def second(rank, work_dir):
    class Twice(Signal):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError('it goes on')

    toy_runner(work_dir, hooks=[Twice(signal.SIGTERM)], launcher='none').train()


def test_a_second_signal_ends_it_at_once(tmp_path):
    run_ranks(tmp_path / 'meet', second, tmp_path / 'run', world=1, codes=[130])


def one_is_told(rank, work_dir, wrapper):
    hooks = [Signal(signal.SIGUSR1, iteration=5)] if rank == 1 else []
    with pytest.raises(SystemExit) as exit_:
        toy_runner(
            work_dir,
            hooks=hooks,
            launcher='pytorch',
            cfg=dict(model_wrapper_cfg=WRAPPERS[wrapper]),
        ).train()
    return exit_.value.code


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_all_processes_stop_after_the_same_iteration(tmp_path, wrapper):
    codes = run_ranks(tmp_path / 'meet', one_is_told, tmp_path / 'run', wrapper)
    assert codes == [128 + signal.SIGUSR1] * 2
    path, passed_over = find_resumable(tmp_path / 'run')
    assert (Path(path).name, passed_over) == ('iter_5.pth', [])


def test_handlers_of_others_stay(tmp_path, monkeypatch):
    seen = []
    mine = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        toy_runner(tmp_path, hooks=[Signal(signal.SIGUSR1, 2), Signal(signal.SIGHUP, 3)]).train()
    finally:
        signal.signal(signal.SIGUSR1, mine)
        signal.signal(signal.SIGHUP, hangup)
    assert seen == [1]
    assert (tmp_path / 'epoch_4.pth').exists()


class Diverging(ToyModel):
    """Has a loss that is not finite in some iterations, and weights from one on."""

    def __init__(self, losses=(), weights=99):
        super().__init__()
        self.losses, self.weights, self.calls = losses, weights, 0

    def forward(self, x, mode='tensor'):
        found = super().forward(x, mode)
        if mode == 'loss':
            self.calls += 1
            if self.calls in self.losses:
                found['loss_box'] = found['loss'].detach() * float('nan')
            if self.calls >= self.weights:
                self.head.weight.data[0, 1] = float('inf')
        return found


def keep_weights(monkeypatch):
    monkeypatch.setattr('torch.optim.AdamW.step', lambda self, closure=None: None)


def log_of(runner):
    return next(Path(runner.log_dir).glob('*.log')).read_text()


def test_a_loss_that_is_not_finite_is_named_at_once(tmp_path, monkeypatch):
    keep_weights(monkeypatch)
    runner = toy_runner(tmp_path, model=Diverging([2, 3, 5, 6, 7]), hooks=[OrderlyEndHook(3)])
    with pytest.raises(DivergenceError) as error:
        runner.train()
    assert 'not finite in 3 iterations in a row' in str(error.value)
    assert 'iteration 7 (loss_box=nan)' in str(error.value)
    assert f'The newest checkpoint is {tmp_path}/epoch_2.pth' in str(error.value)
    assert '\n' not in str(error.value)
    named = [line for line in log_of(runner).splitlines() if 'is not finite' in line]
    assert [line.split('Iteration ')[1][0] for line in named] == list('23567')
    assert all('loss_box=nan' in line for line in named)


@pytest.mark.parametrize(('given', 'limit'), [((), 20), ((0,), None)])
def test_the_limit_is_twenty_or_what_is_set(tmp_path, monkeypatch, given, limit):
    keep_weights(monkeypatch)
    runner = toy_runner(
        tmp_path,
        by_epoch=False,
        model=Diverging(range(99)),
        hooks=[OrderlyEndHook(*given)],
        train_cfg=dict(by_epoch=False, max_iters=25, val_interval=99),
    )
    if limit is None:
        runner.train()
    else:
        with pytest.raises(DivergenceError, match=f'{limit} iterations in a row'):
            runner.train()
    with pytest.raises(ValueError, match=r'OrderlyEndHook\.max_non_finite=-1 must be'):
        OrderlyEndHook(-1)


@pytest.mark.parametrize('keep', [1, 2])
def test_weights_that_are_not_finite_replace_no_good_checkpoint(tmp_path, monkeypatch, keep):
    monkeypatch.setattr(ToyMetric, 'compute_metrics', lambda self, results: dict(acc=len(results)))
    runner = toy_runner(
        tmp_path,
        model=Diverging(weights=5),
        hooks=[OrderlyEndHook(0)],
        checkpoint=dict(max_keep_ckpts=keep, save_best='toy/acc', rule='greater'),
    )
    with pytest.raises(CheckpointError, match=r'not finite \(.*epoch_1\.pth') as error:
        runner.train()
    assert 'Mend that' in str(error.value)
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['epoch_1.pth']
    for value in load_checkpoint(tmp_path / 'epoch_1.pth')['state_dict'].values():
        assert value.isfinite().all()


def bad_on_one(rank, work_dir):
    runner = toy_runner(
        work_dir,
        hooks=[OrderlyEndHook(0)],
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=WRAPPERS['ddp']),
    )

    class Spoil(Hook):
        def before_train_epoch(self, runner):
            if runner.rank == 1:
                runner.model.module.head.bias.data.fill_(float('nan'))

    runner.register_hook(Spoil())
    with pytest.raises(CheckpointError) as error:
        runner.train()
    return str(error.value)


def test_all_processes_know_of_weights_that_are_not_finite(tmp_path):
    one, other = run_ranks(tmp_path / 'meet', bad_on_one, tmp_path / 'run')
    assert one == other
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_infinite_constants_are_no_divergence(tmp_path):
    model = ToyModel()
    model.register_buffer('mask', torch.tensor([0.0, -float('inf')]))
    toy_runner(tmp_path, model=model).train()
    assert (tmp_path / 'epoch_4.pth').exists()
