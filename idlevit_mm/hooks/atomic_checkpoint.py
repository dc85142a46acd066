"""Checkpoints that neither a kill at any moment nor a full disk can harm."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from ..errors import CheckpointError, SettingError
from .exact_resume import BATCHES

# Name in the message hub, of a checkpoint that was written before one was due.
_INTERIM = 'interim_ckpt'


def provisional_name(filename: str) -> str:
    """Name of a file until it is complete; hidden, and none that ``--resume`` looks at."""
    return f'.{filename}.part'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, in an order that always leaves one checkpoint to resume from.

    Differences:

    - An outdated checkpoint, a best one too, is deleted after its successor is written, not before
      (with ``max_keep_ckpts=1`` a kill in between lost everything). The note ``last_checkpoint`` is
      replaced in one step.
    - A checkpoint that cannot be written (full disk, quota, lost file system) does not end the
      training: the older ones stay, an error is logged, and the next one is due as usual. If the
      last one of the training could not be written, the training ends in an error, on all
      processes. One whose weights are not finite counts as one that cannot be written.
    - After a resume the best score found by a repeated validation is stored in the last checkpoint
      as well.

    All arguments are those of ``CheckpointHook``. With a runner other than
    ``idlevit_mm.engine.ResumableRunner`` a failed or killed write may leave an incomplete file.
    """

    keep_ckpt_ids: deque[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.interval == 0:
            raise ValueError('CheckpointHook.interval=0; allowed: from 1 on, or -1 for never')
        self._unwritten: dict[str, str] = {}  # which newest checkpoints are not there, and why
        self._saved_at: dict[str, int] = {}  # epoch and iteration of the last one

    def before_train(self, runner: Any) -> None:
        """Prepare the folders, and take up the last checkpoint of the run being resumed."""
        super().before_train(runner)
        self._unwritten.clear()
        self._saved_at = {}
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
        template = 'iter_{}.pth'
        runner.message_hub.update_info(_INTERIM, template.format(meta['iter']))
        # Of those that are kept it is none.
        with mock.patch.multiple(self, by_epoch=False, filename_tmpl=template, max_keep_ckpts=-1):
            self._save_checkpoint_with_step(runner, meta['iter'], meta)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        if isinstance(runner, _WatchedRunner):
            runner = runner.wrapped  # the last checkpoint is not one of the best
        hub, last = runner.message_hub, self.last_ckpt
        info = dict(hub.runtime_info)
        # A checkpoint names itself and those that are kept beside it.
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        hub.update_info('last_ckpt', self.last_ckpt)
        kept = list(self.keep_ckpt_ids) if self.max_keep_ckpts > 0 else []
        if self.max_keep_ckpts > 0 and kept[-1:] != [step]:
            self.keep_ckpt_ids.append(step)  # the first one goes where there are too many
            hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        interim = info.get(_INTERIM)
        if interim != filename:
            hub.pop_info(_INTERIM)

        def write() -> None:
            runner.save_checkpoint(
                self.out_dir,
                filename,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                note = Path(runner.work_dir, 'last_checkpoint')
                part = note.with_name(provisional_name(note.name))
                part.write_text(str(self.last_ckpt))
                part.replace(note)

        if self._succeeds('last', filename, write, runner):
            self._saved_at = {name: meta[name] for name in ('epoch', 'iter')}
            outdated = [n for n in kept if n not in self.keep_ckpt_ids]
            for name in map(self.filename_tmpl.format, outdated):
                self._delete(name, runner)
            if interim not in (None, filename):
                self._delete(interim, runner)
            return
        self.last_ckpt = last
        _put_back(hub, info, 'last_ckpt', 'keep_ckpt_ids', _INTERIM)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        if not self.save_best:
            return
        if unknown := [key for key in self.key_indicators if key not in ('auto', *metrics)]:
            raise SettingError(
                f'default_hooks.checkpoint.save_best={unknown[0]!r} is no score of this '
                f'validation; allowed: auto, {", ".join(metrics)}. Go on with --resume'
            )
        hub = runner.message_hub
        info = dict(hub.runtime_info)
        # mmengine deletes the best one so far before it writes a better one, if it knows of it.
        self._set_best_paths({})
        watched = _WatchedRunner(runner, self)
        with contextlib.suppress(_NotWritten):
            super()._save_best_checkpoint(watched, metrics)
        for name in [name for name in hub.runtime_info if name.startswith('best_ckpt')]:
            old, new = info.get(name), hub.get_info(name)
            if os.path.basename(new) not in watched.written:
                _put_back(hub, info, name, name.replace('ckpt', 'score', 1))
            elif old not in (None, new):
                self._delete(os.path.basename(old), runner)
        self._set_best_paths(hub.runtime_info)

    def _set_best_paths(self, info: dict[str, Any]) -> None:
        """Let mmengine know of those best checkpoints that are in a message hub's records."""
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = info.get('best_ckpt')
        else:
            names = self.key_indicators
            self.best_ckpt_path_dict = {name: info.get(f'best_ckpt_{name}') for name in names}

    def _succeeds(self, kind: str, name: str, write: Callable[[], None], runner: Any) -> bool:
        """Let the main process write a file; tell all processes whether it could."""
        # A shard may be all right where that of another process is not.
        bad = next(filter(None, all_gather_object(_not_finite(runner.model))), None)
        problems = [f'the weights are not finite ({bad})' if bad else None]
        try:
            if bad is None:
                write()
        except OSError as error:
            problems = [f'{error.strerror or error} ({self.out_dir})']
        broadcast_object_list(problems)
        if problems[0] is None:
            self._unwritten.pop(kind, None)
            return True
        self._unwritten[kind] = problems[0]
        runner.logger.error(
            f'Checkpoint {name} could not be written: {problems[0]}. What was saved before is '
            'untouched; the training goes on and saves again when the next checkpoint is due.'
        )
        return False

    def _delete(self, name: str, runner: Any) -> None:
        """Delete an outdated checkpoint."""
        if not is_main_process():
            return
        path = self.file_backend.join_path(self.out_dir, name)
        try:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
        except OSError as error:
            runner.logger.warning(f'The outdated checkpoint {path} cannot be deleted: {error}')


def _not_finite(model: torch.nn.Module) -> str | None:
    """Name of a weight that is not finite; infinite ones may be meant where nothing is learned."""
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values.items():
        part = value.to_local() if hasattr(value, 'to_local') else value
        found = part.isfinite() if value.requires_grad else ~part.isnan()
        if not found.all():
            return name
    return None


class _NotWritten(Exception):
    """Leaves mmengine's code that would report a best checkpoint which is not there."""


class _WatchedRunner:
    """A runner that notes what checkpoints it has written; ``hook`` reports failures."""

    def __init__(self, runner: Any, hook: AtomicCheckpointHook) -> None:
        self.wrapped, self._hook = runner, hook
        self.written: set[str] = set()

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        def write() -> None:
            self.wrapped.save_checkpoint(out_dir, filename, *args, **kwargs)

        if not self._hook._succeeds('best', filename, write, self.wrapped):
            raise _NotWritten
        self.written.add(filename)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def _put_back(hub: Any, info: dict[str, Any], *names: str) -> None:
    """Give entries of the message hub the values they had."""
    for name in names:
        if name in info:
            hub.update_info(name, info[name])
        else:
            hub.pop_info(name, None)
