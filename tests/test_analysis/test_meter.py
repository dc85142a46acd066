"""Charges of nested calls, and that nothing stays replaced."""

import types

import pytest
from torch import nn

from idlevit_mm.analysis.meter import Call, Meter, metered, module_calls, replaced


class _Clock:
    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return _Clock()


def _worker(clock):
    """Two calls, one inside the other, that take 3 and 5."""
    worker = types.SimpleNamespace()

    def inner():
        clock.now += 5

    def outer():
        clock.now += 1
        worker.inner()
        clock.now += 2

    worker.inner, worker.outer = inner, outer
    return worker


def test_the_innermost_call_pays(clock):
    worker = _worker(clock)
    calls = [Call('outer', worker, 'outer'), Call('inner', worker, 'inner')]
    with metered(calls, clock) as meter:
        worker.outer()
        clock.now += 7
        worker.inner()
        meter.charge()
    assert meter.totals == {'other': 7, 'outer': 3, 'inner': 10}
    meter.restart()
    assert meter.totals == {}
    clock.now += 1
    meter.charge()
    assert meter.totals == {'other': 1}


def test_a_label_can_follow_from_the_call_around(clock):
    worker = _worker(clock)
    within = Call(lambda running: f'{running}/inner', worker, 'inner')
    with metered([Call('a', worker, 'outer'), within], clock) as meter:
        worker.outer()
        worker.inner()
    assert meter.totals == {'other': 0, 'a': 3, 'a/inner': 5, 'other/inner': 5}


def test_relabelling_the_rest_of_a_call(clock):
    meter = Meter(clock)
    meter.enter('first')
    clock.now += 2
    meter.relabel('second')
    clock.now += 3
    meter.leave()
    meter.relabel('nothing runs')
    assert meter.running == 'other'
    assert meter.totals == {'other': 0, 'first': 2, 'second': 3}


def test_everything_is_put_back(clock):
    linear = nn.Linear(2, 3)
    worker = _worker(clock)
    inner = worker.inner
    calls = [*module_calls('a', nn.Sequential(linear)), Call('b', worker, 'inner')]
    with metered(calls, clock):
        assert 'forward' in vars(linear)
        assert worker.inner is not inner
    assert 'forward' not in vars(linear)
    assert worker.inner is inner


def test_what_is_missing_or_named_twice(clock):
    worker = _worker(clock)
    seen = []

    def around(label, function):
        seen.append(label)
        return function

    calls = [Call('a', worker, 'inner'), Call('b', worker, 'inner'), Call('c', worker, 'nothing')]
    with replaced(calls, around):
        worker.inner()
    assert seen == ['a']


def test_an_error_does_not_leave_its_call_running(clock):
    worker = types.SimpleNamespace(fail=lambda: 1 / 0)
    fail = worker.fail
    with metered([Call('a', worker, 'fail')], clock) as meter:
        with pytest.raises(ZeroDivisionError):
            worker.fail()
        assert meter.running == 'other'
    with pytest.raises(ZeroDivisionError), metered([Call('a', worker, 'fail')], clock):
        worker.fail()
    assert worker.fail is fail
