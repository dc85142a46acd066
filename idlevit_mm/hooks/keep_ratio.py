"""Keep ratios that change during training; evaluation sees the configured ones.

A table of ratios is what ``IdleBackbone.keep_ratios`` holds: one list per stage with one ratio per
block. The hooks work on one table for each idle backbone of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from ..backbones import IdleBackbone
from ..errors import SettingError
from ..policies import checked_ratio
from .replay import KEEP_RATIO_STREAM, mixed_seed, run_seed

Table = list[list[float]]

UNITS = ('model', 'stage', 'block')


def half_cosine(step: int, begin: int, end: int) -> float:
    """Fall from 1 at step ``begin`` to 0 at step ``end``; constant before and after."""
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def annealed_ratio(target: float, start_ratio: float, share: float) -> float:
    """Ratio on the way down to its target (EViT, arXiv 2202.07800).

    Args:
        target: Configured ratio.
        start_ratio: Ratio at the start; a larger target stays as it is all the time.
        share: 1 at the start, 0 at the end.
    """
    start = max(start_ratio, target)
    # A sum of two products keeps the order of targets whatever is rounded: policies that refuse a
    # ratio above that of the block before would trip over the last digit.
    return min(max((1.0 - share) * target + share * start, target), start)


def spread_draws(
    draws: Sequence[float], targets: Table, per: str, keep_dense: bool, descending: bool
) -> Table:
    """Give every block of a backbone its drawn ratio.

    Args:
        draws: One ratio for the model, for each stage, or for each block.
        targets: Configured ratios.
        per: What gets a ratio of its own; one of ``UNITS``.
        keep_dense: Whether blocks with a target of 1.0 stay dense.
        descending: Whether to sort the drawn ratios within each stage, the largest first.
    """
    values = iter(draws)
    shared = next(values) if per == 'model' else None
    table = []
    for stage in targets:
        if per == 'block':
            drawn = [next(values) for _ in stage]
        else:
            drawn = [next(values) if shared is None else shared] * len(stage)
        dense = [keep_dense and target == 1.0 for target in stage]
        idle = [ratio for ratio, is_dense in zip(drawn, dense, strict=True) if not is_dense]
        if descending:
            idle.sort(reverse=True)
        rest = iter(idle)
        table.append([1.0 if is_dense else next(rest) for is_dense in dense])
    return table


class KeepRatioHook(Hook, ABC):
    """Base of hooks that set the keep ratios before each training iteration.

    The configured ratios are put back for validation and test and after the training. The mean
    over all blocks is logged as ``keep_ratio``. Nothing is stored: ratios follow from the
    iteration, the epoch and the seed, so a resumed run goes on as if it had never stopped.
    """

    SCALAR = 'train/keep_ratio'

    _targets: tuple[tuple[IdleBackbone, Table], ...] = ()

    @property
    def targets(self) -> list[Table]:
        """Configured ratios of each idle backbone; empty outside of training."""
        return [table for _, table in self._targets]

    def before_train(self, runner: Any) -> None:
        """Take down the configured ratios, and try out the ones that will be set.

        Raises:
            SettingError: The model has no idle backbone or refuses the ratios, there is another
                hook of this kind, or the arguments do not fit the training loop.
        """
        self._restore()  # an exception may have ended an earlier training
        others = [hook for hook in runner.hooks if isinstance(hook, KeepRatioHook)]
        if len(others) > 1:
            names = ', '.join(type(hook).__name__ for hook in others)
            raise SettingError(f'custom_hooks has {names}: only one hook can set the keep ratios')
        self._targets = tuple(
            (backbone, [list(stage) for stage in backbone.keep_ratios])
            for backbone in idle_backbones(runner.model, type(self).__name__)
        )
        self._prepare(runner)
        for tables in self._extremes():
            self._try_out(tables)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Set and log the ratios of this iteration."""
        tables = self._current(runner)
        for (backbone, _), table in zip(self._targets, tables, strict=True):
            if table != backbone.keep_ratios:
                backbone.set_keep_ratios(table)
        ratios = [ratio for table in tables for stage in table for ratio in stage]
        runner.message_hub.update_scalar(self.SCALAR, sum(ratios) / len(ratios))

    def before_val(self, runner: Any) -> None:
        self._restore()

    def before_test(self, runner: Any) -> None:
        self._restore()

    def after_train(self, runner: Any) -> None:
        self._restore()
        self._targets = ()

    @abstractmethod
    def _current(self, runner: Any) -> list[Table]:
        """Ratios of this iteration, for each backbone."""

    @abstractmethod
    def _extremes(self) -> Iterator[list[Table]]:
        """Ratios that a policy is most likely to refuse, for each backbone."""

    def _prepare(self, runner: Any) -> None:
        """Fit the arguments to the training loop."""

    def _restore(self) -> None:
        for backbone, table in self._targets:
            backbone.set_keep_ratios(table)

    def _try_out(self, tables: list[Table]) -> None:
        try:
            for (backbone, _), table in zip(self._targets, tables, strict=True):
                try:
                    backbone.set_keep_ratios(table)
                except (TypeError, ValueError) as error:
                    raise SettingError(
                        f'{type(self).__name__} may set ratios that {type(backbone).__name__} '
                        f'refuses: {error}'
                    ) from error
        finally:
            self._restore()


@HOOKS.register_module()
class KeepRatioWarmupHook(KeepRatioHook):
    """Lets each block's ratio fall to its configured one by a half cosine (EViT's annealing).

    ``begin``, ``end``, ``by_epoch`` and ``convert_to_iter_based`` mean what they mean in mmengine's
    parameter schedulers.

    Args:
        end: Epoch or iteration from which on the ratios are the configured ones.
        begin: Epoch or iteration at which they begin to fall.
        start_ratio: Ratio up to ``begin``, in (0, 1]; blocks with a larger one keep theirs.
        by_epoch: Whether ``begin`` and ``end`` are epochs, and ratios change once per epoch.
        convert_to_iter_based: Whether to change ratios with each iteration although ``begin`` and
            ``end`` are epochs.

    Raises:
        TypeError: ``begin`` or ``end`` is no whole number, or ``start_ratio`` no number.
        ValueError: ``begin`` is negative or ``end`` not larger, ``start_ratio`` lies outside
            (0, 1], or ``convert_to_iter_based`` without ``by_epoch``.
    """

    def __init__(
        self,
        end: int,
        begin: int = 0,
        start_ratio: float = 1.0,
        by_epoch: bool = True,
        convert_to_iter_based: bool = False,
    ) -> None:
        for name, value in (('begin', begin), ('end', end)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f'KeepRatioWarmupHook.{name}={value!r} must be a whole number')
        if not 0 <= begin < end:
            raise ValueError(
                f'KeepRatioWarmupHook: begin={begin}, end={end}; allowed: 0 <= begin < end'
            )
        if convert_to_iter_based and not by_epoch:
            raise ValueError(
                'KeepRatioWarmupHook: convert_to_iter_based=True needs by_epoch=True, since it '
                'turns epochs into iterations'
            )
        self.begin = begin
        self.end = end
        self.start_ratio = checked_ratio(start_ratio, 'KeepRatioWarmupHook: start_ratio is')
        self.by_epoch = by_epoch
        self.convert_to_iter_based = convert_to_iter_based
        self._epoch_length = 1  # iterations; known when training begins

    def _prepare(self, runner: Any) -> None:
        if self.convert_to_iter_based:
            self._epoch_length = len(runner.train_dataloader)
        elif self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise SettingError(
                'KeepRatioWarmupHook: by_epoch=True, but the training loop counts iterations; '
                'set by_epoch=False, or convert_to_iter_based=True'
            )
        length = runner.max_epochs if self._steps_are_epochs else runner.max_iters
        if self.end * self._epoch_length > length:
            runner.logger.warning(
                f'KeepRatioWarmupHook.end={self.end} lies behind the end of the training: the '
                'configured keep ratios, with which the model is evaluated, are never trained.'
            )
        if all(ratio >= self.start_ratio for t in self.targets for stage in t for ratio in stage):
            runner.logger.warning(
                f'KeepRatioWarmupHook changes nothing: no keep ratio is below '
                f'start_ratio={self.start_ratio}.'
            )

    @property
    def _steps_are_epochs(self) -> bool:
        return self.by_epoch and not self.convert_to_iter_based

    def _current(self, runner: Any) -> list[Table]:
        step = runner.epoch if self._steps_are_epochs else runner.iter
        return self._at(step)

    def _extremes(self) -> Iterator[list[Table]]:
        begin, end = (edge * self._epoch_length for edge in (self.begin, self.end))
        for step in (begin, (begin + end) // 2, end):
            yield self._at(step)

    def _at(self, step: int) -> list[Table]:
        length = self._epoch_length
        share = half_cosine(step, self.begin * length, self.end * length)
        return [
            [[annealed_ratio(ratio, self.start_ratio, share) for ratio in stage] for stage in table]
            for table in self.targets
        ]


@HOOKS.register_module()
class RandomKeepRatioHook(KeepRatioHook):
    """Draws new ratios for each training iteration, so that one model serves many ratios.

    A draw follows from the seed of the run and the iteration alone: it is the same on all ranks,
    also under ``diff_rank_seed``, and in a resumed run.

    Args:
        low: Smallest ratio, in (0, 1].
        high: Largest ratio, in (0, 1].
        choices: Ratios to draw from, instead of ``low`` and ``high``.
        per: What gets a ratio of its own: the ``model``, each ``stage`` or each ``block``.
        keep_dense: Whether blocks with a configured ratio of 1.0 stay dense.
        descending: Whether ratios drawn per block are sorted within each stage, the largest
            first, for policies whose ratio must not rise within a stage.

    Raises:
        TypeError: A ratio is no number.
        ValueError: A ratio lies outside (0, 1], ``low`` is larger than ``high``, not exactly one
            of ``low`` and ``choices`` is given, or ``per`` is unknown.
    """

    def __init__(
        self,
        low: float | None = None,
        high: float = 1.0,
        choices: Sequence[float] | None = None,
        per: str = 'model',
        keep_dense: bool = True,
        descending: bool = False,
    ) -> None:
        name = type(self).__name__
        if per not in UNITS:
            raise ValueError(f'{name}: per={per!r} is unknown; allowed: {", ".join(UNITS)}')
        if (low is None) == (choices is None) or (choices is not None and high != 1.0):
            raise ValueError(
                f'{name}: low={low!r}, high={high!r}, choices={choices!r}; allowed: low with or '
                'without high, or choices alone'
            )
        self.per = per
        self.keep_dense = keep_dense
        self.descending = descending
        self.choices: list[float] | None = None
        if choices is None:
            self.low = checked_ratio(low, f'{name}: low is')
            self.high = checked_ratio(high, f'{name}: high is')
            if self.low > self.high:
                raise ValueError(f'{name}: low={low} must not be larger than high={high}')
        else:
            if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
                raise ValueError(f'{name}: choices={choices!r} must be a list of ratios')
            self.choices = sorted(
                checked_ratio(value, f'{name}: choices holds') for value in choices
            )
            self.low, self.high = self.choices[0], self.choices[-1]

    def _prepare(self, runner: Any) -> None:
        if self.keep_dense and all(r == 1.0 for t in self.targets for stage in t for r in stage):
            runner.logger.warning(
                'RandomKeepRatioHook changes nothing: all configured keep ratios are 1.0, and '
                'keep_dense=True leaves such blocks dense.'
            )

    def _current(self, runner: Any) -> list[Table]:
        seed = mixed_seed(run_seed(runner), KEEP_RATIO_STREAM, runner.iter)
        generator = np.random.default_rng(seed)
        if self.choices is None:
            draws = generator.uniform(self.low, self.high, self._count).tolist()
        else:
            draws = generator.choice(self.choices, self._count).tolist()
        return self._spread(draws)

    def _extremes(self) -> Iterator[list[Table]]:
        rising = np.linspace(self.low, self.high, self._count).tolist()
        yield self._spread([self.low] * self._count)
        yield self._spread([self.high] * self._count)
        yield self._spread(rising)
        yield self._spread(rising[::-1])

    @property
    def _count(self) -> int:
        """Number of draws of an iteration."""
        return 1 if self.per == 'model' else sum(map(self._share, self.targets))

    def _share(self, table: Table) -> int:
        """Number of draws that a backbone takes."""
        return len(table) if self.per == 'stage' else sum(map(len, table))

    def _spread(self, draws: list[float]) -> list[Table]:
        tables, taken = [], 0
        for targets in self.targets:
            own = draws
            if self.per != 'model':
                own = draws[taken : taken + self._share(targets)]
                taken += len(own)
            tables.append(spread_draws(own, targets, self.per, self.keep_dense, self.descending))
        return tables


def idle_backbones(model: nn.Module, user: str) -> list[IdleBackbone]:
    """All idle backbones inside a model, which may be wrapped for distributed training.

    Args:
        model: Any model.
        user: Who asks, for the error.

    Raises:
        SettingError: There is none.
    """
    if is_model_wrapper(model):
        model = model.module
    found = [module for module in model.modules() if isinstance(module, IdleBackbone)]
    if not found:
        raise SettingError(f'{user} found no IdleBackbone in {type(model).__name__}')
    return found
