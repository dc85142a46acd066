"""Evo-ViT's two phases of training."""

from __future__ import annotations

from itertools import chain
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..errors import SettingError
from ..policies import EvoViT
from .keep_ratio import check_epochs, idle_backbones


@HOOKS.register_module()
class StageWiseHook(Hook):
    """Lets every block of Evo-ViT rank at first, and only those of ``rank_at`` later on.

    Validation and test always rank as configured.

    Args:
        begin: Epoch or iteration from which on only ``rank_at`` ranks; 200 of 300 epochs in the
            release.
        by_epoch: Whether ``begin`` counts epochs.

    Raises:
        ValueError: ``begin`` is no whole number from 0 on.
    """

    def __init__(self, begin: int, by_epoch: bool = True) -> None:
        if type(begin) is not int or begin < 0:
            raise ValueError(f'StageWiseHook.begin={begin!r} must be a whole number from 0 on')
        self.begin, self.by_epoch = begin, by_epoch
        self._policies: list[EvoViT] = []

    def before_train(self, runner: Any) -> None:
        """Find the policies.

        Raises:
            SettingError: There is none with ``rank_at``, or the loop counts no epochs.
        """
        if self.by_epoch:
            check_epochs(runner, type(self).__name__)
        backbones = idle_backbones(runner.model, type(self).__name__).values()
        policies = [block.policy for b in backbones for block in chain(*b.idle_blocks)]
        self._policies = [p for p in policies if isinstance(p, EvoViT) and p.rank_at is not None]
        if not self._policies:
            raise SettingError('StageWiseHook needs policy=dict(type="EvoViT", rank_at=...)')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Choose the phase."""
        self._set((runner.epoch if self.by_epoch else runner.iter) >= self.begin)

    def before_val(self, runner: Any) -> None:
        self._set(True)

    before_test = after_train = before_val

    def _set(self, stage_wise: bool) -> None:
        for policy in self._policies:
            policy.stage_wise = stage_wise
