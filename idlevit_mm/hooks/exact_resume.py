"""A resumed run ends with the same numbers as one that was never interrupted."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop

from .replay import MODEL_STREAM, VALIDATION_STREAM, ReplayDataLoader, mixed_seed, seed_generators

# Name in the message hub, of the batches of an unfinished epoch: those done, and all.
BATCHES = 'batches_of_the_epoch'


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Ties every random number of the training to the iteration it is drawn in.

    mmengine restores weights, optimiser and schedules, but neither random states nor the place in
    the data. This hook seeds Python, numpy and torch before every iteration from (seed,
    iteration), tells a :class:`ReplayDataLoader` where in the data the run is, and repeats the
    validation that came after the checkpoint, whose results (best score, schedules that follow a
    metric, the log) the checkpoint cannot hold. :class:`idlevit_mm.engine.ResumableRunner`
    adds it and builds the loader; with another runner it still seeds the model's numbers.

    Exact are runs on the CPU, and on accelerators as far as their kernels are deterministic
    (``randomness=dict(seed=..., deterministic=True)``). Not covered: transforms that keep a state
    between samples (cached mosaics) or own a generator (albumentations), and gradient
    accumulation that is under way when a checkpoint is written (a warning says so).
    """

    # After CheckpointHook (VERY_LOW too, registered earlier), which must be ready for validation.
    priority = 'VERY_LOW'
    RECORD = 'last_validation'  # name in the message hub, of the iteration

    def before_train(self, runner: Any) -> None:
        """Find the place in the data, and repeat a validation that the checkpoint precedes."""
        loop, loader = runner.train_loop, runner.train_loop.dataloader
        if isinstance(loop, IterBasedTrainLoop) and isinstance(loader, ReplayDataLoader):
            loader.to_skip = loop.iter
        self._warn_of_accumulation(runner)
        if loop.iter > 0 and self._validation_due(runner):
            runner.logger.info('Validating, as was due after this checkpoint was written.')
            runner.val_loop.run()

    def before_train_epoch(self, runner: Any) -> None:
        """Number the batches of an epoch on from those of the epochs before."""
        loop, loader = runner.train_loop, runner.train_loop.dataloader
        if isinstance(loop, EpochBasedTrainLoop) and isinstance(loader, ReplayDataLoader):
            done, of = runner.message_hub.pop_info(BATCHES) or (0, 1)
            loader.to_skip = done * len(loader) // of
            loader.batch_sampler.position = max(0, loop.iter - loader.to_skip)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the model and its losses draw in this iteration."""
        # runner.seed already holds the rank where randomness.diff_rank_seed asks for that.
        seed_generators(mixed_seed(runner.seed, MODEL_STREAM, runner.iter), accelerator=True)

    def before_val_epoch(self, runner: Any) -> None:
        """Seed what is drawn in validating, and put it on record for every later checkpoint."""
        # The property train_loop would build the loop, and load its data, if there is none yet.
        if isinstance(runner._train_loop, BaseLoop):
            seed = mixed_seed(runner.seed, VALIDATION_STREAM, runner.iter)
            seed_generators(seed, accelerator=True)
            runner.message_hub.update_info(self.RECORD, runner.iter)

    def _validation_due(self, runner: Any) -> bool:
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            now, last = loop.epoch, loop.max_epochs
        elif isinstance(loop, IterBasedTrainLoop):
            now, last = loop.iter, loop.max_iters
        else:
            return False
        if runner.val_loop is None or runner.message_hub.runtime_info.get(BATCHES):
            return False
        loop._decide_current_val_interval()
        if now < loop.val_begin or (now % loop.val_interval and now != last):
            return False
        return runner.message_hub.runtime_info.get(self.RECORD) != loop.iter

    def _warn_of_accumulation(self, runner: Any) -> None:
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        for hook in runner.hooks if counts > 1 else ():
            if not isinstance(hook, CheckpointHook) or hook.interval <= 0:
                continue
            span = hook.interval * (len(runner.train_dataloader) if hook.by_epoch else 1)
            if span % counts:
                runner.logger.warning(
                    f'Checkpoints are written every {span} iterations, which is no multiple of '
                    f'accumulative_counts={counts}: a resumed run loses the gradients that were '
                    'accumulated and will not repeat an uninterrupted one exactly.'
                )
