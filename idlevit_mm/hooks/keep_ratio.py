"""Keep ratios that change during training; evaluation sees the configured ones.

A table of ratios is what ``IdleBackbone.keep_ratios`` holds: one list per stage with one ratio per
block. The hooks work on one table for each idle backbone of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import cycle
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

# What gets a ratio of its own; all blocks of a stage have one but for these sizes.
UNITS = ('model', 'stage', 'pair', 'block')
_SIZES = {'pair': 2, 'block': 1}
# What each of the turns of the sandwich rule takes; None for a draw.
_SANDWICH = ('high', 'low', None, None)


def half_cosine(step: int, begin: int, end: int) -> float:
    """Fall from 1 at step ``begin`` to 0 at step ``end``; constant before and after."""
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def annealed_ratio(target: float, start_ratio: float, share: float) -> float:
    """Ratio on the way down to its target (EViT, arXiv 2202.07800).

    A target above ``start_ratio`` stays as it is; ``share`` is 1 at the start, 0 at the end.
    """
    low, high = Fraction(target), Fraction(max(start_ratio, target))
    # Rounded once, because that keeps every order: policies that refuse a ratio above that of the
    # block before would trip over the last digit, and so would a fall that must never rise.
    return float(low + Fraction(share) * (high - low))


def ratios_of(tables: Sequence[Table]) -> list[float]:
    """The ratios of all blocks."""
    return [ratio for table in tables for stage in table for ratio in stage]


class KeepRatioHook(Hook, ABC):
    """Base of hooks that set the keep ratios before each training iteration.

    The configured ratios are put back for validation and test and after the training. The mean
    over all blocks is logged as ``keep_ratio``. Nothing is stored: ratios follow from the
    iteration, the epoch and the seed, so a resumed run goes on as if it had never stopped.
    """

    SCALAR = 'train/keep_ratio'

    _backbones: Sequence[IdleBackbone] = ()
    # Configured ratios of each; empty outside of training.
    targets: Sequence[Table] = ()

    def before_train(self, runner: Any) -> None:
        """Take down the configured ratios, and try out the ones that will be set.

        Raises:
            SettingError: The model has no idle backbone or refuses the ratios, there is another
                hook of this kind, or the arguments do not fit the training loop.
        """
        self._set(self.targets)  # an exception may have ended an earlier training
        names = [type(hook).__name__ for hook in runner.hooks if isinstance(hook, KeepRatioHook)]
        if len(names) > 1:
            raise SettingError(
                f'custom_hooks has {", ".join(names)}: only one hook can set the keep ratios'
            )
        self._backbones = list(idle_backbones(runner.model, type(self).__name__).values())
        self.targets = [[list(stage) for stage in b.keep_ratios] for b in self._backbones]
        self._prepare(runner)
        try:
            for tables in self._extremes():
                for backbone, table in zip(self._backbones, tables, strict=True):
                    backbone.set_keep_ratios(table)
        except (TypeError, ValueError) as error:
            raise SettingError(
                f'{type(self).__name__} may set ratios that {type(backbone).__name__} refuses: '
                f'{error}'
            ) from error
        finally:
            self._set(self.targets)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Set and log the ratios of this iteration."""
        tables = self._current(runner)
        self._set(tables)
        ratios = ratios_of(tables)
        runner.message_hub.update_scalar(self.SCALAR, sum(ratios) / len(ratios))

    def before_val(self, runner: Any) -> None:
        self._set(self.targets)

    before_test = before_val

    def after_train(self, runner: Any) -> None:
        self._set(self.targets)
        self._backbones = self.targets = ()

    @abstractmethod
    def _prepare(self, runner: Any) -> None:
        """Fit the arguments to the targets and to the training loop."""

    @abstractmethod
    def _current(self, runner: Any) -> list[Table]:
        """Ratios of this iteration, for each backbone."""

    @abstractmethod
    def _extremes(self) -> Iterator[list[Table]]:
        """Ratios that a policy is most likely to refuse, for each backbone."""

    def _set(self, tables: Sequence[Table]) -> None:
        for backbone, table in zip(self._backbones, tables, strict=True):
            if table != backbone.keep_ratios:
                backbone.set_keep_ratios(table)


@HOOKS.register_module()
class KeepRatioWarmupHook(KeepRatioHook):
    """Lets each block's ratio fall to its configured one by a half cosine (EViT's annealing).

    Args:
        end: Epoch or iteration from which on the ratios are the configured ones.
        begin: Epoch or iteration at which they begin to fall.
        start_ratio: Ratio up to ``begin``, in (0, 1]; blocks with a larger one keep theirs.
        by_epoch: As in mmengine's parameter schedulers: ``begin`` and ``end`` are epochs, and
            ratios change once per epoch.
        convert_to_iter_based: As there: ratios change with each iteration all the same.

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
            raise ValueError(f'KeepRatioWarmupHook: {begin=}, {end=}; allowed: 0 <= begin < end')
        if convert_to_iter_based and not by_epoch:
            raise ValueError(
                'KeepRatioWarmupHook: convert_to_iter_based=True needs by_epoch=True, since it '
                'turns epochs into iterations'
            )
        self.begin, self.end = begin, end
        self.start_ratio = checked_ratio(start_ratio, 'KeepRatioWarmupHook: start_ratio is')
        self.convert_to_iter_based = convert_to_iter_based
        self._steps_are_epochs = by_epoch and not convert_to_iter_based

    def _prepare(self, runner: Any) -> None:
        if self._steps_are_epochs:
            check_epochs(runner, 'KeepRatioWarmupHook', ', or convert_to_iter_based=True')
        each = len(runner.train_dataloader) if self.convert_to_iter_based else 1
        self._span = self.begin * each, self.end * each
        if self._span[1] > (runner.max_epochs if self._steps_are_epochs else runner.max_iters):
            runner.logger.warning(
                f'KeepRatioWarmupHook.end={self.end} lies behind the end of the training: the '
                'configured keep ratios, with which the model is evaluated, are never trained.'
            )
        if min(ratios_of(self.targets)) >= self.start_ratio:
            runner.logger.warning(
                f'KeepRatioWarmupHook changes nothing: no keep ratio is below '
                f'start_ratio={self.start_ratio}.'
            )

    def _current(self, runner: Any) -> list[Table]:
        step = runner.epoch if self._steps_are_epochs else runner.iter
        return self._at(half_cosine(step, *self._span))

    def _extremes(self) -> Iterator[list[Table]]:
        return map(self._at, (1.0, 0.5, 0.0))

    def _at(self, share: float) -> list[Table]:
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
        low: Smallest ratio.
        high: Largest ratio.
        choices: Ratios to draw from, instead of ``low`` and ``high``.
        per: What gets a ratio of its own: the ``model``, each ``stage``, each ``block``, or each
            ``pair`` of blocks of a stage (SparseViT, arXiv 2303.17605).
        keep_dense: Whether blocks with a configured ratio of 1.0 stay dense.
        descending: Whether ratios are sorted within each stage, the largest first, for policies
            whose ratio must not rise within a stage.
        sandwich: Whether iterations take turns: the largest ratio everywhere, the smallest, then
            two draws (the sandwich rule, arXiv 1903.05134). With ``accumulative_counts=4`` of the
            optimizer wrapper the four make one step.

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
        sandwich: bool = False,
    ) -> None:
        name = type(self).__name__
        if per not in UNITS:
            raise ValueError(f'{name}: per={per!r} is unknown; allowed: {", ".join(UNITS)}')
        if (low is None) == (choices is None) or (choices is not None and high != 1.0):
            raise ValueError(
                f'{name}: {low=}, {high=}, {choices=}; allowed: low with or without high, or '
                'choices alone'
            )
        self.per, self.keep_dense, self.descending = per, keep_dense, descending
        self.sandwich = sandwich
        self.choices: list[float] | None = None
        if choices is None:
            self.low = checked_ratio(low, f'{name}: low is')
            self.high = checked_ratio(high, f'{name}: high is')
            if self.low > self.high:
                raise ValueError(f'{name}: {low=} must not be larger than {high=}')
        elif not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
            raise ValueError(f'{name}: {choices=} must be a list of ratios')
        else:
            self.choices = sorted(checked_ratio(r, f'{name}: choices holds') for r in choices)
            self.low, self.high = self.choices[0], self.choices[-1]

    def _prepare(self, runner: Any) -> None:
        units = [self._units(stage) for table in self.targets for stage in table]
        self._count = 1 if self.per == 'model' else sum(map(len, units))  # of draws
        if self.keep_dense and min(ratios_of(self.targets)) == 1.0:
            runner.logger.warning(
                'RandomKeepRatioHook changes nothing: all configured keep ratios are 1.0, and '
                'keep_dense=True leaves such blocks dense.'
            )

    def _current(self, runner: Any) -> list[Table]:
        turn = runner.iter % len(_SANDWICH)
        if self.sandwich and (bread := _SANDWICH[turn]):
            return self.spread([getattr(self, bread)] * self._count)
        seed = mixed_seed(run_seed(runner), KEEP_RATIO_STREAM, runner.iter)
        generator = np.random.default_rng(seed)
        if self.choices is None:
            draws = generator.uniform(self.low, self.high, self._count)
        else:
            draws = generator.choice(self.choices, self._count)
        return self.spread(draws.tolist())

    def _extremes(self) -> Iterator[list[Table]]:
        rising = np.linspace(self.low, self.high, self._count).tolist()
        low, high = [self.low] * self._count, [self.high] * self._count
        return map(self.spread, (low, high, rising, rising[::-1]))

    def spread(self, draws: Sequence[float]) -> list[Table]:
        """Give every block its ratio, of one for the model or for each stage, pair or block."""
        values = cycle(draws) if self.per == 'model' else iter(draws)

        def of_stage(stage: list[float]) -> list[float]:
            units = self._units(stage)
            drawn = [(next(values), self._idles(unit)) for unit in units]
            idle = [value for value, idles in drawn if idles]
            rest = iter(sorted(idle, reverse=True) if self.descending else idle)
            own = [next(rest) if idles else 1.0 for _, idles in drawn]
            return [
                value if self._idles([ratio]) else 1.0
                for value, unit in zip(own, units, strict=True)
                for ratio in unit
            ]

        return [[of_stage(stage) for stage in table] for table in self.targets]

    def _units(self, stage: list[float]) -> list[list[float]]:
        """The ratios of a stage, in parts that share one."""
        size = _SIZES.get(self.per, len(stage))
        return [stage[first : first + size] for first in range(0, len(stage), size)]

    def _idles(self, unit: list[float]) -> bool:
        return not self.keep_dense or min(unit) < 1.0


def check_epochs(runner: Any, user: str, more: str = '') -> None:
    """Raise a SettingError where a hook that counts epochs meets a loop that does not."""
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        raise SettingError(
            f'{user}: by_epoch=True, but the training loop counts iterations; set '
            f'by_epoch=False{more}'
        )


def idle_backbones(model: nn.Module, user: str) -> dict[str, IdleBackbone]:
    """All idle backbones inside a model, by name; it may be wrapped for distributed training.

    Raises:
        SettingError: There is none for ``user``, who asks.
    """
    if is_model_wrapper(model):
        model = model.module
    found = {name: part for name, part in model.named_modules() if isinstance(part, IdleBackbone)}
    if not found:
        raise SettingError(f'{user} found no IdleBackbone in {type(model).__name__}')
    return found
