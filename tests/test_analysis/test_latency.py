"""The order and the arithmetic of comparisons, with a clock that only moves when told to."""

import gc

import pytest

from idlevit_mm.analysis.benchmark import benchmark, forward_call, rows_of
from idlevit_mm.analysis.latency import CandidateError, Comparison, Spread, compare, realised_share
from idlevit_mm.analysis.models import noise_image


class _World:
    """Candidates that take given times on a clock of their own, and a diary of calls."""

    def __init__(self, **durations):
        self.now = 0.0
        self.calls = []
        self.durations = durations

    def clock(self):
        return self.now

    def candidates(self):
        def make(name):
            def call():
                self.calls.append(name)
                self.now += self.durations[name](self.now)

            return call

        return {name: make(name) for name in self.durations}


def test_candidates_take_turns_and_warm_up():
    world = _World(a=lambda t: 2.0, b=lambda t: 1.0)
    result = compare(world.candidates(), rounds=4, warmup=2, clock=world.clock)
    assert world.calls[:4] == ['a', 'a', 'b', 'b']
    rounds = [world.calls[4 + 2 * i : 6 + 2 * i] for i in range(4)]
    assert all(sorted(names) == ['a', 'b'] for names in rounds)
    assert [names[0] for names in rounds].count('a') == 2  # neither is always first
    assert result.seconds == {'a': (2.0,) * 4, 'b': (1.0,) * 4}
    assert result.reference == 'a'
    assert result.ratio('b').median == 0.5
    assert result.ratio('a', 'b').median == 2.0


def test_a_slow_spell_leaves_the_ratio_alone():
    def slow(duration):
        return lambda t: duration * (10 if 20 <= t < 60 else 1)

    world = _World(dense=slow(2.0), idle=slow(1.0))
    result = compare(world.candidates(), rounds=21, warmup=0, clock=world.clock)
    assert result.ratio('idle').median == 0.5
    assert result.time('dense') == Spread(2.0, 2.0, 2.0)
    assert max(result.seconds['dense']) == 20.0


def test_time_limit_but_three_rounds_at_least():
    world = _World(a=lambda t: 1.0, b=lambda t: 1.0)
    assert len(compare(world.candidates(), max_seconds=9, clock=world.clock).seconds['a']) == 5
    assert len(compare(world.candidates(), max_seconds=0, clock=world.clock).seconds['b']) == 3


def test_device_is_waited_for_within_the_timed_span():
    world = _World(a=lambda t: 1.0)

    def wait():
        world.now += 5.0

    result = compare(world.candidates(), rounds=3, warmup=0, clock=world.clock, synchronize=wait)
    assert result.seconds['a'] == (6.0, 6.0, 6.0)


def test_garbage_collection_is_given_back_when_a_candidate_fails():
    def fail():
        raise RuntimeError('broken')

    assert gc.isenabled()
    with pytest.raises(CandidateError, match='b: broken') as error:
        compare({'a': int, 'b': fail}, warmup=0)
    assert error.value.name == 'b'
    assert gc.isenabled()


def test_a_timer_of_its_own_takes_the_place_of_the_clock():
    seconds = iter((1.0, 3.0, 4.0, 2.0))
    calls = []

    def timer(call):
        call()
        return next(seconds)

    candidates = {name: lambda name=name: calls.append(name) for name in 'ab'}
    result = compare(candidates, rounds=2, warmup=0, timer=timer)
    assert calls == ['a', 'b', 'b', 'a']
    assert result.seconds == {'a': (1.0, 2.0), 'b': (3.0, 4.0)}


@pytest.mark.parametrize(
    ('candidates', 'options', 'message'),
    [
        ({}, {}, 'candidates'),
        ({'a': int}, {'reference': 'b'}, "reference='b'"),
        ({'a': int}, {'rounds': 0}, 'rounds=0'),
        ({'a': int}, {'warmup': -1}, 'warmup=-1'),
    ],
)
def test_wrong_arguments(candidates, options, message):
    with pytest.raises(ValueError, match=message):
        compare(candidates, **options)


def test_spread():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)


def test_realised_share():
    # Half the operations in half the time: all that was saved is saved time.
    assert realised_share(0.5, 0.5) == 1.0
    assert realised_share(0.8, 0.5) == 0.625


def test_rows():
    timing = Comparison({'dense': (0.4, 0.4, 0.4), 'idle': (0.3, 0.2, 0.1)}, 'dense')
    dense, idle = rows_of(timing, {'dense': 2_000_000, 'idle': 1_000_000}, batch=2)
    assert dense.realised is None
    assert idle.milliseconds.median == pytest.approx(100.0)
    assert idle.time_ratio.median == pytest.approx(0.5)
    assert idle.operation_ratio == 0.5
    assert idle.realised == pytest.approx(1.0)


def test_benchmark_of_small_backbones():
    torch = pytest.importorskip('torch')
    models = {'wide': torch.nn.Conv2d(3, 8, 1), 'narrow': torch.nn.Conv2d(3, 2, 1)}
    rows, timing = benchmark(
        models, noise_image((2, 3, 5, 7)), rounds=3, warmup=1, reference='wide'
    )
    assert [row.multiply_adds for row in rows] == [5 * 7 * 3 * 8, 5 * 7 * 3 * 2]
    assert rows[1].operation_ratio == 0.25
    assert len(timing.seconds['narrow']) == 3


def test_unknown_part():
    with pytest.raises(ValueError, match="part='neck'"):
        forward_call(None, None, 'neck')
