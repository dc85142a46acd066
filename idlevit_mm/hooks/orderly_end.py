"""A training ends in order: when it is told to, and when it has nothing to learn from any more."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from mmengine.dist import all_reduce, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ..errors import DivergenceError
from .atomic_checkpoint import AtomicCheckpointHook
from .exact_resume import ExactResumeHook

# Not every system has all of them.
SIGNALS = [one for one in signal.Signals if one.name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1')]
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)
# torchrun hands on to its processes what a terminal or Slurm has told them already.
_SAME_WISH = 2.0 if 'TORCHELASTIC_RUN_ID' in os.environ else 0.0  # seconds


class Stopped(SystemExit):
    """Ends the program of a training that was told to stop, with 128 + the number of the signal."""


@HOOKS.register_module()
class OrderlyEndHook(Hook):
    """Ends a training with a checkpoint when a signal asks for it, or when it diverges.

    - SIGTERM, SIGINT, SIGHUP and SIGUSR1 (which Slurm sends ahead of the end of a job, if asked)
      let the iteration finish; then a checkpoint is written and the program ends with 128 + the
      signal, on all processes after the same iteration. A second signal ends it at once. Signals
      that are ignored, or that have a handler of somebody else's, stay as they are.
    - A loss that is not finite is named at once. After ``max_non_finite`` such iterations in a row
      the training ends in an error. (Checkpoints of weights that are not finite are never written:
      :class:`AtomicCheckpointHook`.)

    :class:`idlevit_mm.engine.ResumableRunner` adds it; name it in ``custom_hooks`` to change it.

    Args:
        max_non_finite: Iterations in a row with a loss that is not finite; 0 for no limit.

    Raises:
        ValueError: ``max_non_finite`` is no whole number from 0 on.
    """

    priority = 'LOWEST'

    def __init__(self, max_non_finite: int = 20) -> None:
        if type(max_non_finite) is not int or max_non_finite < 0:
            raise ValueError(
                f'OrderlyEndHook.max_non_finite={max_non_finite!r} must be a whole number from 0 on'
            )
        self.max_non_finite = max_non_finite
        self._in_a_row = 0
        self._signal = 0
        self._since = 0.0
        self._handlers: dict[int, Any] = {}

    def before_train(self, runner: Any) -> None:
        """Take over the signals."""
        self._in_a_row = self._signal = 0
        for number in SIGNALS:
            if signal.getsignal(number) in _DEFAULT:
                try:
                    self._handlers[number] = signal.signal(number, self._note)
                except ValueError:  # only the main thread may
                    return

    def after_train(self, runner: Any = None) -> None:
        """Give the signals back; the runner also calls it when an exception ends the training."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._since = number, now
        elif now - self._since >= _SAME_WISH:
            os._exit(128 + number)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at the losses, and whether any process was told to stop.

        Raises:
            DivergenceError: Too many iterations in a row had a loss that was not finite.
            Stopped: There was a signal.
        """
        bad = not_finite(outputs)
        if bad:
            runner.logger.error(f'Iteration {runner.iter + 1}: {bad} is not finite.')
        stop, any_bad = _largest(self._signal, int(bool(bad)))
        self._in_a_row = (self._in_a_row + 1) * any_bad
        if self.max_non_finite and self._in_a_row >= self.max_non_finite:
            raise DivergenceError(
                f'the loss was not finite in {self._in_a_row} iterations in a row, the last of '
                f'them iteration {runner.iter + 1} ({bad or "on another process"}). '
                f'{_newest(runner)}. Lower the learning rate, clip gradients '
                '(optim_wrapper.clip_grad) or train without --amp; '
                'OrderlyEndHook.max_non_finite is the limit'
            )
        if stop:
            done = batch_idx + 1 if isinstance(runner.train_loop, EpochBasedTrainLoop) else 0
            self._stop(runner, stop, dict(epoch=runner.epoch, iter=runner.iter + 1), done)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Do not wait for the end of the validation, which a resumed run repeats.

        Processes may have different numbers of batches here, and then cannot agree.
        """
        if self._signal and not is_distributed():
            runner.message_hub.pop_info(ExactResumeHook.RECORD, None)
            self._stop(runner, self._signal, dict(epoch=runner.epoch, iter=runner.iter))

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        """Stop after the validation if any process was told to."""
        if self._handlers and (stop := _largest(self._signal)[0]):
            self._stop(runner, stop, dict(epoch=runner.epoch, iter=runner.iter))

    def _stop(self, runner: Any, number: int, meta: dict[str, int], batches: int = 0) -> None:
        hooks = [hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)]
        for hook in hooks[:1]:
            hook.save_now(runner, meta, batches)
        if is_main_process():
            done = f'{signal.Signals(number).name}: stopped after iteration {meta["iter"]}'
            advice = 'Start the same command again with --resume'
            print(f'{done}. {_newest(runner)}. {advice}', file=sys.stderr, flush=True)
        self.after_train()
        raise Stopped(128 + number)


def not_finite(outputs: Any) -> str:
    """Names and values of the losses in what ``train_step`` returns that are not finite."""
    items = outputs.items() if isinstance(outputs, dict) else ()
    losses = {name: torch.as_tensor(value) for name, value in items if 'loss' in name}
    bad = {name: value for name, value in losses.items() if not value.isfinite().all()}
    return ', '.join(f'{name}={value.tolist()}' for name, value in bad.items())


def _largest(*values: int) -> list[int]:
    """The largest value of each kind over all processes."""
    if not is_distributed():
        return list(values)
    found = torch.tensor(values)
    all_reduce(found, 'max')
    return found.tolist()


def _newest(runner: Any) -> str:
    hooks = [hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)]
    path = hooks[0].last_ckpt if hooks else None
    return f'The newest checkpoint is {path}' if path else 'There is no checkpoint'
