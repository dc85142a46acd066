"""What the units of a backbone cost at each keep ratio, and what damage they do, each alone."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measures
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from trials import Trials, progress

from idlevit_mm.analysis import search
from idlevit_mm.analysis.flops import MultiplyAddCounter
from idlevit_mm.analysis.models import idle_backbone
from idlevit_mm.analysis.results import Line, add_line
from idlevit_mm.errors import UsageError, one_line

PROXIES = ('distance', 'loss', 'metric')


class Tables:
    """All that a search measures of a checkpoint, kept in lines of a file.

    Attributes:
        whole: Seconds and multiply-adds of keep 1.0.
        cost: What units save with each option, as shares of ``whole``: (U, R), negative.
        damage: What they do, by the proxy: (U, R).
    """

    def __init__(
        self, trials: Trials, space: search.Space, args: argparse.Namespace, path: Path
    ) -> None:
        self.trials, self.space, self.args, self.path = trials, space, args, path
        self.lines = trials.read(path)
        self.dense = trials.variant(1.0)
        space_of = dict(per=args.per, ratios=list(space.ratios), attention=list(space.attention))
        costs = self.once(self.costs, kind='costs', **space_of)
        self.whole, table = costs['whole'], np.array(costs['units'])
        index = 1 if args.latency is None else 0
        # What is saved of keep 1.0, as a share of it.
        self.cost = (table[index] - table[index][:, -1:]) / self.whole[index]
        units = progress(range(len(space.units)), self.title)
        own = dict(kind='damage', proxy=args.proxy, **space_of)
        found = [self.once(partial(self.damage_of_unit, u), unit=u, **own) for u in units]
        self.damage = np.array([line['damage'] for line in found])

    def once(self, measure: Callable[[], Line], **key: Any) -> Line:
        """The line that has a key, measured if the file has none."""
        for line in self.lines:
            if key.items() <= line.items():
                return line
        line = dict(self.trials.about, **key, **measure())
        add_line(line, self.path)
        self.lines.append(line)
        return line

    def title(self, unit: int) -> str:
        """A unit in words."""
        stage, blocks = self.space.units[unit]
        return f'damage by stage {stage + 1}, blocks {blocks.start + 1} to {blocks.stop}'

    @torch.no_grad()
    def costs(self) -> Line:
        """Seconds and multiply-adds of keep 1.0, and of each unit with each option, where it is.

        In a pass all units have the same one, so that one ratio everywhere is predicted as it is
        measured.
        """
        model = self.trials.variant(1.0)
        backbone, call = idle_backbone(model), self.trials.call(model)
        units = [[backbone.idle_blocks[stage][at] for at in own] for stage, own in self.space.units]

        def at(option: tuple[float, float]) -> None:
            # A space without attention leaves that of the config.
            backbone.set_keep_ratios(option[0], option[1] if self.space.attention else None)
            call()

        calls = {str(option): partial(at, option) for option in self.space.options}
        rows = {one: list[list[float]]() for one in calls.values()}

        def timer(one: partial[None]) -> float:
            rows[one].append(spent(one, units, measures.moment, measures.seconds_between))
            return rows[one][-1][-1]

        print(f'timing {len(units)} units with {len(calls)} options')
        self.trials.seconds(calls, timer)
        taken = np.array([*rows.values()])  # (R, rounds, U + 1)
        whole = np.median(taken[-1, :, -1])
        shares = np.median(taken / taken[-1:, :, -1:], axis=1)[:, :-1]
        counts: list[list[int]] = []
        for one in calls.values():
            with MultiplyAddCounter() as counter:
                counts.append(spent(one, units, lambda: counter.multiply_adds, lambda a, b: b - a))
        tables = [(whole * shares).T.tolist(), np.array(counts).T[:-1].tolist()]
        return dict(whole=[whole, self.trials.multiply_adds(self.dense)], units=tables)

    def damage_of_unit(self, unit: int) -> Line:
        """What a unit does with each option."""
        top = len(self.space.options) - 1
        choices = np.full((top, len(self.space.units)), top)
        choices[:, unit] = range(top)
        return dict(damage=[*self.damages(map(self.space.keep_ratios, choices.tolist())), 0.0])

    def damages(self, keeps: Iterable[Any]) -> list[float]:
        """What schedules do, by the proxy."""
        models = [self.dense, *(self.trials.variant(keep) for keep in keeps)]
        if self.args.proxy == 'metric':
            full, *scores = (self.trials.score(self.trials.metrics(model))[1] for model in models)
            return [full - score for score in scores]
        with torch.no_grad():
            rows = [self.of_batch(models, data) for data in self.trials.runner.test_dataloader]
        return np.mean(rows, axis=0).tolist()

    def of_batch(self, models: Sequence[nn.Module], batch: Any) -> list[float]:
        """What models do in a batch, against the first of them."""
        data = models[0].data_preprocessor(batch, False)
        if self.args.proxy == 'loss':
            try:
                losses = [m.parse_losses(m(**data, mode='loss'))[0].item() for m in models]
            except (AttributeError, RuntimeError, ValueError) as error:
                raise UsageError(
                    f'--proxy loss: test images give no loss ({one_line(error, 150)}); allowed '
                    'here: distance, metric'
                ) from error
            return [loss - losses[0] for loss in losses[1:]]
        wants, *found = ([*idle_backbone(m)(data['inputs'])] for m in models)
        return [float(np.mean([*map(distance, outs, wants)])) for outs in found]

    def score(self, keep: Any) -> Line:
        """The metric of a schedule, as tools/test.py prints it."""

        def measure() -> Line:
            found = self.trials.score(self.trials.metrics(self.trials.variant(keep)))
            return dict(zip(('score_name', 'score'), found, strict=True))

        return self.once(measure, kind='score', keep_ratios=keep)

    def measured(self, keep: Any) -> Line:
        """Milliseconds, multiply-adds and their share of those of keep 1.0."""
        model = self.trials.variant(keep)
        calls = dict(dense=self.trials.call(self.dense), own=self.trials.call(model))
        seconds = self.trials.seconds(calls)
        count = self.trials.multiply_adds(model)
        time = measures.spread(seconds['own'], seconds['dense'])[0]
        shares = dict(time=time, operations=count / self.whole[1])
        return dict(ms=measures.spread(seconds['own'], 1e-3)[0], multiply_adds=count, **shares)


def spent(
    call: Callable[[], Any],
    units: Sequence[Sequence[nn.Module]],
    moment: Callable[[], Any],
    between: Callable[[Any, Any], Any],
) -> list[Any]:
    """What passes between moments of a call in units, each a sequence of blocks, and in all."""
    first = {own[0]: unit for unit, own in enumerate(units)}
    last = {own[-1]: unit for unit, own in enumerate(units)}
    begun: list[Any] = []
    spans: list[tuple[int, Any, Any]] = []

    def enter(module: nn.Module, *_: Any) -> None:
        if module in first:
            begun.append(moment())

    def leave(module: nn.Module, *_: Any) -> None:
        if module in last:
            spans.append((last[module], begun[-1], moment()))

    # Hooks of all modules at once: those of a block would keep it from its fast ways.
    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave):
        start = moment()
        call()
        end = moment()
    total = between(start, end)
    # Windows of a large image pass one after the other.
    own = [[between(a, b) for at, a, b in spans if at == unit] for unit in range(len(units))]
    return [*map(sum, own), total]


def distance(out: Tensor, want: Tensor) -> float:
    """Squared distance of features, as a share of their square: small ones add up."""
    return ((out - want).square().sum() / want.square().sum()).item()
