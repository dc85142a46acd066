"""Checkpoints that a kill at any moment leaves whole."""

from __future__ import annotations

import os
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, in an order that always leaves one checkpoint to resume from.

    Differences: an outdated checkpoint is deleted after its successor is written, not before
    (with ``max_keep_ckpts=1`` a kill in between lost everything); the note ``last_checkpoint`` is
    replaced in one step; and after a resume the best score found by a repeated validation is
    stored in the last checkpoint as well. All arguments are those of ``CheckpointHook``.
    """

    def before_train(self, runner: Any) -> None:
        """Prepare the folders, and take up the last checkpoint of the run being resumed."""
        super().before_train(runner)
        last = runner.message_hub.runtime_info.get('last_ckpt')
        if runner.iter > 0 and last is not None and self.file_backend.isfile(last):
            self.last_ckpt = last

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
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
        if not is_main_process():
            return

        note = os.path.join(runner.work_dir, 'last_checkpoint')
        part = os.path.join(runner.work_dir, '.last_checkpoint.part')
        with open(part, 'w') as file:
            file.write(str(self.last_ckpt))
        os.replace(part, note)

        if outdated is not None:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
