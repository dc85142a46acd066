"""Checkpoints that neither a kill at any moment nor a full disk can harm."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..errors import CheckpointError, SettingError, likely
from .exact_resume import BATCHES

# Name in the message hub, of a checkpoint that was written before one was due.
_INTERIM = 'interim_ckpt'
# What mmengine's hook knows of the files, which must be true of them.
_KNOWN = ('last_ckpt', 'keep_ckpt_ids', 'best_ckpt_path', 'best_ckpt_path_dict')


def provisional_name(filename: str) -> str:
    """Name of a file until it is complete; hidden, and none that ``--resume`` looks at."""
    return f'.{filename}.part'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, in an order that always leaves one checkpoint to resume from.

    Differences:

    - An outdated checkpoint, a best one too, is deleted after its successor is written, not before
      (with ``max_keep_ckpts=1`` a kill in between lost everything).
    - A checkpoint that cannot be written (full disk, quota, lost file system) does not end the
      training: the older ones stay, an error is logged, and the next one is due as usual. If the
      last one of the training could not be written, the training ends in an error, on all
      processes. One whose weights are not finite counts as one that cannot be written.
    - After a resume the best score found by a repeated validation is stored in the last checkpoint
      as well.

    All arguments are those of ``CheckpointHook``. With a runner other than
    ``idlevit_mm.engine.ResumableRunner`` a failed or killed write may leave an incomplete file.
    """

    file_backend: Any
    _interim: str | None = None
    _is_interim = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.interval) is not int or self.interval == 0:
            raise ValueError(
                f'CheckpointHook.interval={self.interval!r}; allowed: whole numbers from 1 on, or '
                '-1 for never'
            )
        known = inspect.signature(Runner.save_checkpoint).parameters
        for name in self.args:
            if name not in known:
                hint = likely(name, [*inspect.signature(CheckpointHook).parameters, *known])
                raise TypeError(f'CheckpointHook.{name} is no argument{hint}')
        self._unwritten: dict[str, str] = {}  # which newest checkpoints are not there, and why
        self._saved_at: dict[str, int] = {}  # epoch and iteration of the last one

    def before_train(self, runner: Any) -> None:
        """Prepare the folders, and take up the last checkpoint of the run being resumed."""
        super().before_train(runner)
        self._unwritten.clear()
        self._saved_at = {}
        self._interim = runner.message_hub.runtime_info.get(_INTERIM)
        last = runner.message_hub.runtime_info.get('last_ckpt')
        if runner.iter > 0 and last is not None and self.file_backend.isfile(last):
            self.last_ckpt = last
        if is_main_process() and isinstance(self.file_backend, LocalBackend):
            # What a run left that was killed while it wrote.
            for part in Path(self.out_dir).glob(provisional_name('*.pth')):
                with contextlib.suppress(OSError):
                    part.unlink()

    def after_train(self, runner: Any) -> None:
        """Publish the checkpoint after training.

        Raises:
            CheckpointError: The last or the best checkpoint could not be written.
        """
        if 'last' in self._unwritten:
            raise CheckpointError(
                'the training went on to its end, but its last checkpoint could not be written: '
                f'{self._unwritten["last"]}. The newest one is: {self.last_ckpt}. Mend that and '
                'start the same command again with --resume'
            )
        if 'best' in self._unwritten:
            raise CheckpointError(
                f'the training is finished and its last checkpoint is {self.last_ckpt}, but one '
                'with a better score than the best that was kept could not be written: '
                f'{self._unwritten["best"]}'
            )
        super().after_train(runner)

    def save_now(self, runner: Any, meta: dict[str, int], batches: int = 0) -> None:
        """Save before the next checkpoint is due; that one then takes the place of this one.

        Args:
            runner: The runner.
            meta: Epochs and iterations that are done.
            batches: How many of the batches of the next epoch are done too.
        """
        if meta == self._saved_at:
            return
        record = [batches, len(runner.train_dataloader)] if batches else None
        runner.message_hub.update_info(BATCHES, record)
        changes: dict[str, Any] = dict(
            by_epoch=False, filename_tmpl='iter_{}.pth', _is_interim=True
        )
        # Of those that are kept it is none.
        with mock.patch.multiple(self, max_keep_ckpts=-1, **changes):
            self._save_checkpoint_with_step(runner, meta['iter'], meta)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        outdated, name = self._interim, self.filename_tmpl.format(step)
        interim = name if self._is_interim else None
        at = {name: meta[name] for name in ('epoch', 'iter')}  # the runner adds to meta

        def write() -> None:
            runner.message_hub.update_info(_INTERIM, interim)
            if outdated not in (None, name):
                self.file_backend.remove(self.file_backend.join_path(self.out_dir, outdated))
            super(AtomicCheckpointHook, self)._save_checkpoint_with_step(runner, step, meta)

        if self._succeeds('last', name, write, runner):
            self._saved_at, self._interim = at, interim

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        if not self.save_best:
            return
        if unknown := [key for key in self.key_indicators if key not in ('auto', *metrics)]:
            raise SettingError(
                f'default_hooks.checkpoint.save_best={unknown[0]!r} is no score of this '
                f'validation; allowed: auto, {", ".join(metrics)}. Go on with --resume'
            )
        write = functools.partial(super()._save_best_checkpoint, runner, metrics)
        self._succeeds('best', 'of the best score', write, runner)

    def _succeeds(self, kind: str, name: str, write: Callable[[], None], runner: Any) -> bool:
        """Write and then delete what is outdated, or put back what was known; on all processes."""
        hub, backend = runner.message_hub, self.file_backend
        known = {key: copy.copy(vars(self).get(key)) for key in _KNOWN}
        info = dict(hub.runtime_info)
        # A shard may be all right where that of another process is not.
        bad = next(filter(None, all_gather_object(_not_finite(runner.model))), None)
        problems = [f'the weights are not finite ({bad})' if bad else None]
        outdated: list[str] = []
        try:
            if bad is None:
                with (  # some backends cannot delete, and need not
                    mock.patch.object(backend, 'remove', outdated.append, create=True),
                    mock.patch.object(runner, 'save_checkpoint', _together(runner.save_checkpoint)),
                ):
                    write()
        except OSError as error:
            problems = [f'{error.strerror or error} ({self.out_dir})']
        broadcast_object_list(problems)
        if problems[0] is None:
            self._unwritten.pop(kind, None)
            for path in outdated if is_main_process() else ():
                try:
                    if backend.isfile(path):
                        backend.remove(path)
                except OSError as error:
                    runner.logger.warning(f'Outdated, but cannot be deleted: {path}: {error}')
            return True
        self.__dict__.update(known)
        hub._runtime_info.clear()
        hub._runtime_info.update(info)
        self._unwritten[kind] = problems[0]
        runner.logger.error(
            f'Checkpoint {name} could not be written: {problems[0]}. What was saved before is '
            'untouched; the training goes on and saves again when the next checkpoint is due.'
        )
        return False


def _together(save: Callable[..., None]) -> Callable[..., None]:
    """Let a function that writes a checkpoint fail on all processes if it does on the main one."""

    @functools.wraps(save)
    def together(*args: Any, **kwargs: Any) -> None:
        problems: list[OSError | None] = [None]
        try:
            save(*args, **kwargs)
        except OSError as error:
            problems = [error]
        broadcast_object_list(problems)
        if problems[0] is not None:
            raise problems[0]

    return together


def _not_finite(model: torch.nn.Module) -> str | None:
    """Name of a weight that is not finite; infinite ones may be meant where nothing is learned."""
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values.items():
        part = value.to_local() if hasattr(value, 'to_local') else value
        found = part.isfinite() if value.requires_grad else ~part.isnan()
        if not found.all():
            return name
    return None
