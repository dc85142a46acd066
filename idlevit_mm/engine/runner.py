"""mmengine's runner, made safe to kill at any moment."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from mmengine.dist import get_rank, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn

from ..errors import SettingError, UsageError, one_line
from ..hooks import ExactResumeHook, OrderlyEndHook
from ..hooks.atomic_checkpoint import provisional_name
from ..hooks.replay import ReplayDataLoader, run_seed
from .assembly import assembled
from .bad_samples import MAX_PIXELS, guard
from .checks import class_of, find_resumable
from .data_sets import check_built, naming_the_data
from .first import build_first, first_step
from .mends import mend_class_weights
from .settings import naming, part_of
from .sharding import FullyShardedModel, ShardHook, optimizers_of
from .start import locked

_LONGEST_WAIT = 600  # seconds, for a batch


@RUNNERS.register_module()
class ResumableRunner(Runner):
    """A runner whose killed and resumed training equals an uninterrupted one.

    - The place in the data and all random numbers follow from (seed, iteration, rank)
      (:mod:`idlevit_mm.hooks.replay`); resuming skips the data already seen without loading it.
    - Checkpoints appear under their name only when they are complete, and an outdated one is
      deleted only then. They are read without running what is in them.
    - A full disk does not end the training: what cannot be written to logs is left out, and
      :class:`idlevit_mm.hooks.AtomicCheckpointHook` goes on without the checkpoint.
    - A model wrapped as :class:`FullyShardedModel` is sharded before the first iteration.
    - An unusable image is left out of training with a warning; in validation and testing it is an
      error that names the file (:mod:`idlevit_mm.engine.bad_samples`).

    ``tools/train.py`` uses it for every config that names no runner of its own; other tools do if
    the config says ``runner_type='ResumableRunner'``. Arguments are those of
    :class:`mmengine.runner.Runner`.
    """

    _train_dataloader: Any
    _val_dataloader: Any
    _test_dataloader: Any
    _load_from: str | None
    _resume: bool

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Build the model, with cross entropies that can be averaged over ignored pixels.

        Raises:
            SettingError: A part does not build, or does not fit the others.
        """
        built = assembled(lambda: super(ResumableRunner, self).build_model(model), model)
        mend_class_weights(built)
        return built

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register the default hooks, with atomic checkpoints instead of plain ones."""
        checkpoint = (hooks or {}).get('checkpoint', dict(type='CheckpointHook', interval=1))
        kind = class_of(checkpoint.get('type')) if isinstance(checkpoint, dict) else None
        if kind in (('', 'CheckpointHook'), ('mmengine', 'CheckpointHook')):
            checkpoint = dict(checkpoint, type='mmengine.AtomicCheckpointHook')
        super().register_default_hooks({**(hooks or {}), 'checkpoint': checkpoint})

    def register_hooks(
        self, default_hooks: dict | None = None, custom_hooks: list | None = None
    ) -> None:
        """Register the configured hooks, and the one that makes resuming exact."""
        super().register_hooks(default_hooks, custom_hooks)
        for kind in (ExactResumeHook, OrderlyEndHook):
            if not any(isinstance(hook, kind) for hook in self.hooks):
                self.register_hook(kind())
        if isinstance(self.model, FullyShardedModel):
            self.register_hook(ShardHook())

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the logger; a log file that cannot be written is said once, without a traceback."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                _complain_once(handler)
        return logger

    def build_visualizer(self, visualizer: Visualizer | dict | None = None) -> Visualizer:
        """Build the visualizer; what it cannot write because the disk is full is left out."""
        built = super().build_visualizer(visualizer)
        for backend in built._vis_backends.values():
            for method in ('add_scalar', 'add_scalars', 'add_image'):
                if method not in vars(backend):  # visualizers are shared between runners
                    setattr(backend, method, self._forgiving(getattr(backend, method)))
        return built

    def _forgiving(self, write: Callable[..., None]) -> Callable[..., None]:
        """Let a function that writes logs fail without ending the training."""

        @functools.wraps(write)
        def forgiving(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except OSError as error:
                self.logger.error(f'The log cannot be written and lacks an entry: {error}')

        return forgiving

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate to the real batch size, accumulated gradients included."""
        super().scale_lr(optim_wrapper, auto_scale_lr)
        # mmengine counts images of one batch; an update averages over several.
        counts = getattr(optim_wrapper, '_accumulative_counts', 1)
        if auto_scale_lr is None or not auto_scale_lr.get('enable') or counts == 1:
            return
        self.logger.info(f'Scaling the LR by another {counts}: accumulative_counts={counts}.')
        for optimizer in optimizers_of(optim_wrapper):
            for group in optimizer.param_groups:
                group['lr'] *= counts

    def train(self) -> nn.Module:
        """Train; other trainings are kept out of the work dir meanwhile.

        Raises:
            SettingError: A part does not build, which is found before any data are opened.
        """
        try:
            with locked(self.work_dir) if is_main_process() else contextlib.nullcontext():
                if self._train_loop is not None:
                    build_first(self)
                with first_step(self):
                    return super().train()
        finally:
            for hook in self.hooks:
                if isinstance(hook, OrderlyEndHook):
                    hook.after_train()

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; what those of the libraries refuse before the run is named.

        Raises:
            SettingError: One of them cannot work with its arguments.
        """
        if fn_name != 'before_run':
            return super().call_hook(fn_name, **kwargs)
        for hook in self._hooks:
            library = type(hook).__module__.partition('.')[0]
            known = library in ('mmengine', 'mmdet', 'mmseg', 'mmpretrain')
            with naming(type(hook).__name__) if known else contextlib.nullcontext():
                hook.before_run(self)
        return None

    def _init_model_weights(self) -> None:
        with naming('init_cfg of the model'):
            super()._init_model_weights()

    def load_or_resume(self) -> None:
        """Load or resume; ``resume`` without a checkpoint takes the newest whole one."""
        if self._resume and self._load_from is None and not self._has_loaded:
            self._load_from, passed_over = find_resumable(self.work_dir)
            self._resume = self._load_from is not None
            for reason in passed_over:
                self.logger.warning(f'Passed over: {reason}.')
        super().load_or_resume()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume from a checkpoint.

        Raises:
            SettingError: Its state does not fit this training.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SettingError(
                f'{filename} cannot be resumed with this config: {one_line(error, 300)}. To start '
                f'from its weights only: --cfg-options load_from={filename}'
            ) from error
        for optimizer in optimizers_of(self.optim_wrapper):
            lacks = set(optimizer.defaults).difference(*optimizer.param_groups)
            if lacks:
                raise SettingError(
                    f'{filename} was trained with another optimizer than '
                    f'{type(optimizer).__name__}: its state has no {", ".join(sorted(lacks))}. To '
                    f'start from its weights only: --cfg-options load_from={filename}'
                )

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop on a replayable data loader."""
        with self._opened('train', loop):
            built = super().build_train_loop(loop)
        if isinstance(built, EpochBasedTrainLoop):
            built.run_iter = _unless_skipped(built.run_iter)  # type: ignore[method-assign]
        return built

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the validation loop on data that were looked at."""
        with self._opened('val', loop):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the test loop on data that were looked at."""
        with self._opened('test', loop):
            return super().build_test_loop(loop)

    def _opened(self, phase: str, loop: BaseLoop | dict) -> contextlib.AbstractContextManager:
        """Build the data loader of a phase, to stand in for its config while its loop is built."""
        name = f'_{phase}_dataloader'
        config = getattr(self, name)
        if isinstance(loop, BaseLoop) or not isinstance(config, dict):
            return contextlib.nullcontext()
        with naming_the_data(phase, config):
            loader = self.build_dataloader(
                config,
                seed=self.seed,
                diff_rank_seed=self._randomness_cfg.get('diff_rank_seed', False),
            )
        check_built(loader.dataset, self.model, phase)
        max_pixels = part_of(self.cfg, 'env_cfg').get('max_pixels', MAX_PIXELS)
        guard(loader.dataset, phase == 'train', self.model, max_pixels)
        if loader.drop_last and not len(loader):
            raise SettingError(
                f'{phase}_dataloader.batch_size={loader.batch_size} with drop_last=True, but '
                f'{len(loader.dataset)} images make no whole batch'
            )
        if loader.num_workers > 0:
            # A worker that finds no shared memory says nothing, and its batch never comes.
            loader.timeout = loader.timeout or _LONGEST_WAIT
            loader.worker_init_fn = functools.partial(_apart, loader.worker_init_fn)
        # Iterable data sets and loaders without batches have no index to tie a seed to.
        if phase == 'train' and loader.batch_sampler is not None:
            loader = ReplayDataLoader.from_loader(loader, run_seed(self), get_rank())
        # The loop takes the built loader; scale_lr and others still read the config.
        return mock.patch.object(self, name, loader)

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save a checkpoint under a provisional name and rename it when it is complete.

        The main process writes. With a sharded model the others must call this too.

        Raises:
            OSError: It cannot be written; nothing is left of it, what was there is untouched.
        """
        if not is_main_process():
            if isinstance(self.model, FullyShardedModel):
                # Gathering is collective: the same calls, in the order of the main process.
                self.model.module.state_dict()
                if save_optimizer:
                    self.optim_wrapper.state_dict()
            return
        options = (file_client_args, save_optimizer, *args)
        backend = get_file_backend(out_dir, backend_args=kwargs.get('backend_args'))
        if not isinstance(backend, LocalBackend) or file_client_args:
            super().save_checkpoint(out_dir, filename, *options, **kwargs)
            return
        part = os.path.join(out_dir, provisional_name(filename))
        try:
            super().save_checkpoint(out_dir, os.path.basename(part), *options, **kwargs)
            with open(part, 'rb+') as file:
                os.fsync(file.fileno())
            os.replace(part, os.path.join(out_dir, filename))
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(part)
            raise


def _unless_skipped(run_iter: Callable[..., None]) -> Callable[..., None]:
    """Let an epoch pass over the batches that a checkpoint within it had seen already."""

    @functools.wraps(run_iter)
    def run(idx: int, data_batch: Any) -> None:
        if data_batch is not None:
            run_iter(idx, data_batch)

    return run


def _apart(initialise: Callable[[int], None] | None, worker: int) -> None:
    """Keep signals from a data loading worker that are meant for the process it works for.

    A terminal, and whoever ends a group of processes, would end the workers before the training
    can finish its iteration.
    """
    if hasattr(os, 'setpgrp'):
        os.setpgrp()
    if initialise is not None:
        initialise(worker)


def _complain_once(handler: logging.FileHandler) -> None:
    """Replace the traceback that a log file prints for each line on a full disk."""
    report = handler.handleError
    said = functools.cache(functools.partial(print, file=sys.stderr))

    def complain(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            report(record)
        else:
            said(f'log file {handler.baseFilename} cannot be written: {error}')

    handler.handleError = complain  # type: ignore[method-assign]
