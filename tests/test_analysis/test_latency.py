"""The order and the arithmetic of comparisons, with a clock that only moves when told to."""

import gc
import re

import pytest
from measures import (
    CandidateError,
    compare,
    machine,
    spread,
    versions,
)


class _World:
    """Candidates that take given times on a clock of their own, and a diary of calls."""

    def __init__(self, **durations):
        self.now = 0.0
        self.calls = []
        self.durations = durations

    def timer(self, call):
        begin = self.now
        call()
        return self.now - begin

    def candidates(self):
        def make(name):
            def call():
                self.calls.append(name)
                self.now += self.durations[name](self.now)

            return call

        return {name: make(name) for name in self.durations}


def test_candidates_take_turns_and_warm_up():
    world = _World(a=lambda t: 2.0, b=lambda t: 1.0)
    result = compare(world.candidates(), rounds=4, warmup=2, timer=world.timer)
    assert world.calls[:4] == ['a', 'a', 'b', 'b']
    rounds = [world.calls[4 + 2 * i : 6 + 2 * i] for i in range(4)]
    assert all(sorted(names) == ['a', 'b'] for names in rounds)
    assert [names[0] for names in rounds].count('a') == 2  # neither is always first
    assert result == {'a': [2.0] * 4, 'b': [1.0] * 4}


def test_a_slow_spell_leaves_the_ratio_alone():
    def slow(duration):
        return lambda t: duration * (10 if 20 <= t < 60 else 1)

    world = _World(dense=slow(2.0), idle=slow(1.0))
    result = compare(world.candidates(), rounds=21, warmup=0, timer=world.timer)
    assert spread(result['idle'], result['dense'])[0] == 0.5
    assert spread(result['dense']) == [2.0, 2.0, 2.0]
    assert max(result['dense']) == 20.0


def test_time_limit_but_three_rounds_at_least():
    world = _World(a=lambda t: 1.0, b=lambda t: 1.0)
    assert len(compare(world.candidates(), max_seconds=9, timer=world.timer)['a']) == 5
    assert len(compare(world.candidates(), max_seconds=0, timer=world.timer)['b']) == 3


def test_garbage_collection_is_given_back_when_a_candidate_fails():
    def fail():
        raise RuntimeError('broken')

    assert gc.isenabled()
    with pytest.raises(CandidateError, match='b: broken') as error:
        compare({'a': int, 'b': fail}, warmup=0)
    assert error.value.name == 'b'
    assert gc.isenabled()


def test_wrong_arguments():
    for candidates, options, message in (
        ({}, {}, 'candidates'),
        ({'a': int}, {'rounds': 0}, 'rounds=0'),
        ({'a': int}, {'warmup': -1}, 'warmup=-1'),
    ):
        with pytest.raises(ValueError, match=message):
            compare(candidates, **options)


def test_spread():
    assert spread([3.0]) == [3.0, 3.0, 3.0]
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == [3.0, 2.0, 4.0]
    assert spread([5.0, 1.0, 4.0], [1.0, 2.0, 2.0]) == [2.0, 1.25, 3.5]


def test_where_it_was_measured():
    assert machine().endswith(' cores')
    assert re.match(r'Python 3\.\d+\.\d+, torch \d', versions())
