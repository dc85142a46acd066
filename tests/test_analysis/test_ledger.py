"""The memory of a study and the order of its runs, with runs that take no time."""

import json
import threading
from dataclasses import dataclass

import pytest

from idlevit_mm.analysis.ledger import Ledger, OutOfTime, Result, Run, execute, seed_deviation
from idlevit_mm.analysis.runs import RunFailed


@dataclass(frozen=True)
class Letter:
    name: str


A, B, C = (Letter(name) for name in 'abc')
PLAN = [Run(letter, 0) for letter in (A, B, C)]


class _Runner:
    def __init__(self, seconds=10.0, fail=()):
        self.done = []
        self.seconds = seconds
        self.fail = fail

    def __call__(self, run):
        self.done.append(run.name)
        if run.name in self.fail:
            raise RunFailed(f'{run.name} broke')
        return Result(0.5, self.seconds)


def _open(path, **settings):
    return Ledger(path, Letter, {'epochs': 4, **settings})


@pytest.fixture
def ledger(tmp_path):
    return _open(tmp_path / 'out' / 'runs.jsonl')


def _quiet(_):
    pass


def test_finished_runs_are_not_done_again(ledger):
    first = _Runner()
    results = execute(PLAN[:2], ledger, first, jobs=1, report=_quiet)
    assert first.done == [run.name for run in PLAN[:2]]
    second = _Runner()
    again = execute(PLAN, _open(ledger.path), second, jobs=1, report=_quiet)
    assert second.done == [PLAN[2].name]
    assert set(again) == set(PLAN)
    assert again.items() >= results.items()


def test_other_settings_are_other_runs(ledger):
    run = Run(A, 0)
    ledger.add(run, Result(0.7, 1.0))
    assert ledger.read() == {run: Result(0.7, 1.0)}
    assert _open(ledger.path, epochs=5).read() == {}


def test_half_a_line_loses_one_run_only(ledger):
    kept, torn, new = (Run(A, seed) for seed in range(3))
    ledger.add(kept, Result(0.7, 1.0))
    ledger.add(torn, Result(0.6, 1.0))
    text = ledger.path.read_text()
    ledger.path.write_text(text[:-20])
    assert set(ledger.read()) == {kept}
    ledger.add(new, Result(0.5, 1.0))
    assert set(ledger.read()) == {kept, new}


def test_a_failure_keeps_what_was_done(ledger):
    runner = _Runner(fail={PLAN[1].name})
    with pytest.raises(RunFailed, match='broke'):
        execute(PLAN, ledger, runner, jobs=1, report=_quiet)
    assert set(ledger.read()) == {PLAN[0]}
    assert runner.done == [run.name for run in PLAN[:2]]  # nothing new was started


def test_no_run_is_started_that_would_end_too_late(ledger):
    now = iter(range(0, 1000, 10))
    with pytest.raises(OutOfTime, match='1 runs'):
        execute(
            PLAN,
            ledger,
            _Runner(seconds=10.0),
            jobs=1,
            deadline=25,
            clock=lambda: float(next(now)),
            report=_quiet,
        )
    assert len(ledger.read()) == 2


def test_several_runs_at_a_time(ledger):
    both = threading.Barrier(2, timeout=20)

    def runner(run):
        both.wait()  # breaks unless two runs are under way at once
        return Result(0.5, 1.0)

    plan = [Run(A, seed) for seed in range(4)]
    assert len(execute(plan, ledger, runner, jobs=2, report=_quiet)) == 4


def test_spread_between_seeds():
    results = {
        Run(A, 0): Result(0.70, 1),
        Run(A, 1): Result(0.72, 1),
        Run(B, 0): Result(0.60, 1),
        Run(B, 1): Result(0.60, 1),
    }
    # Squares 2 * 0.01^2 and 0, one degree of freedom each.
    assert seed_deviation(results) == pytest.approx(0.01)
    assert seed_deviation({Run(A, 0): Result(0.7, 1)}) is None


def test_settings_of_each_variant(ledger):
    sizes = {A: {'size': (1, 2)}, B: {'size': (3,)}}
    both = Ledger(ledger.path, Letter, sizes.get, score_key='points')
    both.add(Run(A, 0), Result(1.0, 1.0))
    both.add(Run(B, 0), Result(2.0, 1.0))
    assert json.loads(ledger.path.read_text().splitlines()[0])['points'] == 1.0
    # Tuples become lists in the file: that is no other setting.
    assert both.read() == {Run(A, 0): Result(1.0, 1.0), Run(B, 0): Result(2.0, 1.0)}
    del sizes[A]
    sizes[B] = {'size': (4,)}
    assert both.read() == {}


def test_lines_of_another_study_are_passed_over(ledger):
    ledger.add(Run(A, 0), Result(0.7, 1.0))
    line = json.loads(ledger.path.read_text())
    line['variant'] = {'keep_ratio': 0.5}
    with ledger.path.open('a') as file:
        file.write(json.dumps(line) + '\n')
    assert set(ledger.read()) == {Run(A, 0)}
