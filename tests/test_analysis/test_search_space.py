"""The search under tables: the space that is counted, and the front against all schedules."""

from itertools import product

import numpy as np
import pytest

from idlevit_mm.analysis import search
from idlevit_mm.errors import UsageError

NINE = [tenths / 10 for tenths in range(2, 11)]


def test_the_space_of_sparsevit():
    space = search.space_of((2, 2, 6, 2), 'pair', NINE, falling=True)
    assert space.size == 120_285
    assert space.keep_ratios([8, 0, 8, 4, 3, 1]) == [
        *([1.0, 1.0], [0.2, 0.2]),
        *([1.0, 1.0, 0.6, 0.6, 0.5, 0.5], [0.3, 0.3]),
    ]
    assert space.legal([0, 8, 3, 5, 1, 7]) == [0, 8, 3, 3, 1, 7]


@pytest.mark.parametrize('falling', [True, False])
@pytest.mark.parametrize('per', search.PER)
def test_the_front_is_that_of_all_schedules(per, falling):
    space = search.space_of((1, 3, 2), per, (0.3, 0.5, 0.8), falling)
    generator = np.random.default_rng(0)
    shape = len(space.units), len(space.ratios)
    # Small whole numbers, so that many schedules tie.
    cost, damage = (generator.integers(0, 30, shape).astype(float) for _ in range(2))
    every = [list(c) for c in product(range(shape[1]), repeat=shape[0])]
    every = np.array([c for c in every if space.legal(c) == c])
    assert len(every) == space.size
    rows = np.arange(shape[0])
    sums = np.array([(cost[rows, c].sum(), damage[rows, c].sum()) for c in every])
    front = search.best_schedules(space, cost, damage)
    for budget in range(int(sums[:, 0].min()), int(sums[:, 0].max()) + 1):
        best = sums[sums[:, 0] <= budget, 1].min()
        assert front.damage[front.cost <= budget].min() == best
    assert (np.diff(front.cost) > 0).all()
    assert (np.diff(front.damage) < 0).all()
    for c, *found in zip(front.choices, front.cost, front.damage, strict=True):
        assert [cost[rows, c].sum(), damage[rows, c].sum()] == found
        assert space.legal(list(c)) == list(c)


def test_ratios_of_few_that_attend():
    """Where they are as many as the active ones, they are no option of their own."""
    space = search.space_of((1, 2), 'stage', (0.2, 0.6), True, attention=[0.2, 0.0, 0.2, 1.0])
    assert space.options[:2] == [(0.2, 0.0), (0.2, 1.0)]
    assert space.options[2:] == [(0.6, 0.0), (0.6, 0.2), (0.6, 1.0), (1.0, 1.0)]
    assert space.size == 36
    assert space.keep_ratios([5, 3]) == dict(
        keep_ratios=[[1.0], [0.6, 0.6]], attention_ratios=[[1.0], [0.2, 0.2]]
    )
    cost = np.array([[9, 0, 9, 9, 4, 8], [9, 1, 9, 9, 1, 3]])
    assert search.uniform_schedules(space, cost, 0.2)[1] == pytest.approx([11, 8, 5, 3, 1])


def test_uniform_ratios():
    space = search.space_of((1, 2), 'stage', (0.2, 0.6), True)
    ratios, cost = search.uniform_schedules(space, np.array([[0, 4, 8], [1, 1, 3]]), 0.2)
    assert ratios.tolist() == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert cost == pytest.approx([11, 8, 5, 3, 1])


@pytest.mark.parametrize(
    ('text', 'want'), [('0.7x', (0.7, True)), ('25ms', (0.025, False)), ('.5s', (0.5, False))]
)
def test_budgets(text, want):
    assert search.parse_budget('--latency', text, ('ms', 's')) == want


@pytest.mark.parametrize('text', ['25', '-1x', '0x', 'nanx', '2G', ''])
def test_no_budgets(text):
    with pytest.raises(UsageError, match='allowed are a share such as 0.7x, or 25ms, 25s'):
        search.parse_budget('--latency', text, ('ms', 's'))
