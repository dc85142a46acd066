"""mmengine's runner, made safe to kill at any moment."""

from __future__ import annotations

import os
from typing import Any

from mmengine.dist import get_rank, master_only
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch.utils.data import DataLoader

from ..hooks import ExactResumeHook
from ..hooks.replay import ReplayDataLoader, run_seed
from .bad_samples import check_built, guard, naming_the_data
from .safe_load import allow_mmengine_globals


@RUNNERS.register_module()
class ResumableRunner(Runner):
    """A runner whose killed and resumed training equals an uninterrupted one.

    - The training data loader is replayable (:mod:`idlevit_mm.hooks.replay`): the place in the
      data and all random numbers follow from (seed, iteration, rank). Resuming an iteration
      based run skips the data already seen without loading it.
    - Checkpoints appear under their name only when they are complete, and an outdated one is
      deleted only then.
    - Checkpoints are read by torch's safe reader.
    - An unusable image is left out of training with a warning; in validation and testing it is an
      error that names the file (:mod:`idlevit_mm.engine.bad_samples`).

    ``tools/train.py`` uses it for every config that names no runner of its own. The train tools of
    mmdet and mmseg use it if the config says ``runner_type='ResumableRunner'`` and imports
    ``idlevit_mm`` by ``custom_imports``.
    Arguments are those of :class:`mmengine.runner.Runner`.
    """

    _train_dataloader: Any
    _val_dataloader: Any
    _test_dataloader: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        allow_mmengine_globals()
        super().__init__(*args, **kwargs)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register the default hooks, with atomic checkpoints instead of plain ones."""
        hooks = dict(hooks or {})
        checkpoint = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
        plain = ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook)
        if isinstance(checkpoint, dict) and checkpoint.get('type') in plain:
            hooks['checkpoint'] = dict(checkpoint, type='mmengine.AtomicCheckpointHook')
        super().register_default_hooks(hooks)

    def register_hooks(
        self, default_hooks: dict | None = None, custom_hooks: list | None = None
    ) -> None:
        """Register the configured hooks, and the one that makes resuming exact."""
        super().register_hooks(default_hooks, custom_hooks)
        if not any(isinstance(hook, ExactResumeHook) for hook in self.hooks):
            self.register_hook(ExactResumeHook())

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop on a replayable data loader."""
        config: Any = self._train_dataloader
        if isinstance(loop, BaseLoop) or not isinstance(config, dict):
            return super().build_train_loop(loop)
        loader = self._open('train', config)
        # Iterable data sets and loaders without batches have no index to tie a seed to.
        if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
            loader = ReplayDataLoader.from_loader(loader, run_seed(self), get_rank())
        # The loop takes the built loader; scale_lr and others still read the config.
        self._train_dataloader = loader
        try:
            return super().build_train_loop(loop)
        finally:
            self._train_dataloader = config

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the validation loop on data that were looked at."""
        config: Any = self._val_dataloader
        if isinstance(loop, BaseLoop) or not isinstance(config, dict):
            return super().build_val_loop(loop)
        self._val_dataloader = self._open('val', config)
        try:
            return super().build_val_loop(loop)
        finally:
            self._val_dataloader = config

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the test loop on data that were looked at."""
        config: Any = self._test_dataloader
        if isinstance(loop, BaseLoop) or not isinstance(config, dict):
            return super().build_test_loop(loop)
        self._test_dataloader = self._open('test', config)
        try:
            return super().build_test_loop(loop)
        finally:
            self._test_dataloader = config

    def _open(self, phase: str, config: dict) -> DataLoader:
        """Build a data loader; what is wrong with its data is said by name."""
        with naming_the_data(phase, config):
            loader = self.build_dataloader(
                config,
                seed=self.seed,
                diff_rank_seed=self._randomness_cfg.get('diff_rank_seed', False),
            )
        check_built(loader.dataset, self.model, phase)
        guard(loader.dataset, training=phase == 'train')
        return loader

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint under a provisional name and rename it when it is complete."""
        backend_args = kwargs.get('backend_args')
        local = isinstance(get_file_backend(out_dir, backend_args=backend_args), LocalBackend)
        if not local or kwargs.get('file_client_args') or (args and args[0]):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        part = os.path.join(out_dir, f'.{filename}.part')
        super().save_checkpoint(out_dir, os.path.basename(part), *args, **kwargs)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, os.path.join(out_dir, filename))
