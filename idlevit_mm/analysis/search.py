"""Keep ratios under a budget: what can be chosen, and the best of it by tables that add up.

A *unit* is one or more blocks of a stage that have one *option*: a keep ratio, and whether all
active tokens attend or few. What a schedule costs and the damage that it does are taken to be sums
over units; under these sums the answer is exact.

Shape letters: U units, R options, P points of a front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError
from ..policies import checked_ratio

PER = dict(stage=None, pair=2, block=1)
_UNITS = dict(k=1e3, M=1e6, G=1e9, T=1e12, ms=1e-3, s=1.0)


class Space(NamedTuple):
    """The schedules that can be chosen from.

    Attributes:
        units: The stage of each unit, and the numbers of its blocks in the stage.
        ratios: Ratios of a unit, ascending; the last is 1.
        falling: Whether options must not rise within a stage.
        attention: Shares of the tokens that may attend, ascending, instead of all active ones.
    """

    units: tuple[tuple[int, range], ...]
    ratios: tuple[float, ...]
    falling: bool
    attention: tuple[float, ...] = ()

    @property
    def options(self) -> list[tuple[float, float]]:
        """Keep ratio and attention ratio of each option, ascending; the last is 1 and 1."""
        shares = *self.attention, 1.0
        return [(r, a) for r in self.ratios for a in shares if a == 1.0 or a < r < 1.0]

    @property
    def size(self) -> int:
        """How many schedules there are."""
        count = len(self.options)
        lengths = [len(list(own)) for _, own in groupby(self.units, key=lambda unit: unit[0])]
        return math.prod(math.comb(n + count - 1, n) if self.falling else count**n for n in lengths)

    def keep_ratios(self, choice: Sequence[int]) -> Any:
        """Ratios of the blocks of each stage, of the number (U,) of an option for each unit.

        A list per stage; where few may attend, arguments of ``set_keep_ratios``, two such lists.
        """
        tables: list[list[list[float]]] = [[], []]
        for (stage, blocks), index in zip(self.units, choice, strict=True):
            for table, ratio in zip(tables, self.options[index], strict=True):
                table += [[] for _ in range(stage + 1 - len(table))]
                table[stage] += [ratio] * len(blocks)
        names = 'keep_ratios', 'attention_ratios'
        return dict(zip(names, tables, strict=True)) if self.attention else tables[0]

    def legal(self, choice: Sequence[int]) -> list[int]:
        """A choice with options lowered where they must not rise."""
        found: list[int] = []
        for number, index in enumerate(choice):
            first = number == 0 or self.units[number - 1][0] != self.units[number][0]
            found.append(index if first or not self.falling else min(index, found[-1]))
        return found


class Front(NamedTuple):
    """The schedules than which none is both cheaper and less damaging, by rising cost.

    Attributes:
        cost: (P,).
        damage: (P,).
        choices: Number of the option of each unit, (P, U).
    """

    cost: np.ndarray
    damage: np.ndarray
    choices: np.ndarray


def space_of(
    depths: Sequence[int],
    per: str,
    ratios: Sequence[float],
    falling: bool,
    attention: Sequence[float] = (),
) -> Space:
    """The space of a backbone, a unit per ``stage``, ``pair`` of its blocks, or ``block``."""
    units = tuple(
        (stage, range(first, min(first + (PER[per] or depth), depth)))
        for stage, depth in enumerate(depths)
        for first in range(0, depth, PER[per] or depth)
    )
    shares = {checked_ratio(share, '--attention holds', nothing=True) for share in attention}
    return Space(units, tuple(sorted({*ratios, 1.0})), falling, tuple(sorted(shares - {1.0})))


def undominated(cost: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Numbers of the points (P,) that no other one beats in both, by rising cost."""
    order = np.lexsort((damage, cost))
    least = np.minimum.accumulate(damage[order])
    return order[np.append(True, damage[order][1:] < least[:-1])]


def best_schedules(space: Space, cost: np.ndarray, damage: np.ndarray) -> Front:
    """The front of the whole space under sums of tables (U, R).

    It goes from unit to unit and drops what is beaten by a schedule that can go on in all the same
    ways, so that nothing of the front of all schedules is lost.
    """
    last = len(space.options) - 1
    # By the option that the unit before has.
    states = {last: Front(np.zeros(1), np.zeros(1), np.zeros((1, 0), np.uint8))}
    for unit, (stage, _) in enumerate(space.units):
        bound = space.falling and unit > 0 and space.units[unit - 1][0] == stage
        following = {}
        for index in range(last, -1, -1):
            before = _merged([own for at, own in states.items() if not bound or at >= index])
            following[index] = Front(
                before.cost + cost[unit, index],
                before.damage + damage[unit, index],
                np.insert(before.choices, unit, index, axis=1),
            )
        states = following
    return _merged(list(states.values()))


def uniform_schedules(
    space: Space, cost: np.ndarray, step: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """One ratio for all blocks, falling by ``step``, and what it costs by a table (U, R)."""
    ratios = np.arange(1.0, space.ratios[0] - step / 2, -step).round(6)
    whole = [index for index, (_, attention) in enumerate(space.options) if attention == 1.0]
    return ratios, sum(np.interp(ratios, space.ratios, own[whole]) for own in cost)


def parse_budget(option: str, text: str, units: Sequence[str]) -> tuple[float, bool]:
    """A budget from the command line, and whether it is a share of what keep 1.0 costs (``0.7x``).

    Raises:
        UsageError: It is not written like that, or not positive.
    """
    found = re.fullmatch(rf'(\d+\.?\d*|\.\d+)(x|{"|".join(units)})', text)
    if not found or not float(found[1]) > 0:
        allowed = ', '.join(f'25{unit}' for unit in units)
        raise UsageError(f'{option} {text}: allowed are a share such as 0.7x, or {allowed}')
    return float(found[1]) * _UNITS.get(found[2], 1.0), found[2] == 'x'


def _merged(fronts: Sequence[Front]) -> Front:
    whole = Front(*(np.concatenate(parts) for parts in zip(*fronts, strict=True)))
    best = undominated(whole.cost, whole.damage)
    return Front(*(part[best] for part in whole))
