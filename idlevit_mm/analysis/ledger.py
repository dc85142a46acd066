"""Runs of a study and the file that remembers them.

A study compares variants: one run per variant and seed, several at a time. Finished runs are kept
in a JSON lines file, so that starting a study again goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from idlevit_mm.analysis import runs


class Variant(Protocol):
    """One row of a table: a frozen dataclass of JSON values with a name."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Short text, unique among the variants of a study."""


V = TypeVar('V', bound=Variant)


@dataclass(frozen=True)
class Run(Generic[V]):
    """One run: a variant and a seed."""

    variant: V
    seed: int

    @property
    def name(self) -> str:
        """Short text, unique among the runs of a study."""
        return f'{self.variant.name}-seed{self.seed}'


@dataclass(frozen=True)
class Result:
    """What a finished run left: its score, in the unit of its study, and the seconds it took."""

    score: float
    seconds: float


def scores_of(variant: V, results: Mapping[Run[V], Result]) -> list[float]:
    """Score of each finished seed of a variant, in the order of the seeds."""
    found = [(run.seed, result.score) for run, result in results.items() if run.variant == variant]
    return [score for _, score in sorted(found)]


def seed_deviation(results: Mapping[Run[V], Result]) -> float | None:
    """Standard deviation of one run around its variant's mean, pooled over all variants."""
    squares, freedom = 0.0, 0
    for variant in {run.variant for run in results}:
        scores = scores_of(variant, results)
        if len(scores) > 1:
            squares += sum((score - statistics.fmean(scores)) ** 2 for score in scores)
            freedom += len(scores) - 1
    return (squares / freedom) ** 0.5 if freedom else None


class Ledger(Generic[V]):
    """Finished runs in a JSON lines file, one line each, written when a run ends.

    Runs with other settings (another checkpoint, config or number of epochs) may stand in the
    same file: they are kept and not used.

    Args:
        path: the file.
        variant_type: class of the variants.
        settings: what a result depends on besides variant and seed; the same for all variants, or
            a function of the variant that returns None for one that is not part of the study.
        score_key: what the score is called in the file.
    """

    def __init__(
        self,
        path: Path,
        variant_type: type[V],
        settings: Mapping[str, Any] | Callable[[V], Mapping[str, Any] | None],
        score_key: str = 'score',
    ) -> None:
        self.path = path
        self.variant_type = variant_type
        self.settings = settings
        self.score_key = score_key
        self._lock = threading.Lock()

    def settings_of(self, variant: V) -> Any:
        """The settings of a variant as they read in the file; None if it is not of the study."""
        found = self.settings(variant) if callable(self.settings) else self.settings
        return json.loads(json.dumps(found))

    def read(self) -> dict[Run[V], Result]:
        """All finished runs with these settings."""
        results: dict[Run[V], Result] = {}
        if not self.path.is_file():
            return results
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the process was killed while it wrote this line
            try:
                variant = self.variant_type(**entry['variant'])
            except TypeError:
                continue  # a line of another study
            settings = self.settings_of(variant)
            if settings is not None and entry['settings'] == settings:
                results[Run(variant, entry['seed'])] = Result(
                    entry[self.score_key], entry['seconds']
                )
        return results

    def add(self, run: Run[V], result: Result) -> None:
        """Append one finished run."""
        entry = {
            'variant': asdict(run.variant),
            'seed': run.seed,
            self.score_key: result.score,
            'seconds': result.seconds,
            'settings': self.settings_of(run.variant),
        }
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A killed process may have left half a line: do not write into it.
            torn = self.path.is_file() and self.path.read_bytes()[-1:] not in (b'', b'\n')
            with self.path.open('a') as file:
                file.write(('\n' if torn else '') + json.dumps(entry) + '\n')


class OutOfTime(Exception):
    """The time budget ended before all runs were done."""


def execute(
    plan: Iterable[Run[V]],
    ledger: Ledger[V],
    runner: Callable[[Run[V]], Result],
    *,
    jobs: int = 2,
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] = print,
) -> dict[Run[V], Result]:
    """Do the runs of a plan that are not in the ledger, several at a time.

    Args:
        plan: the runs, in the order in which they are started.
        ledger: knows finished runs and is told of each new one.
        runner: does one run; called from several threads.
        jobs: runs at a time.
        deadline: no run is started that would probably end later, judged by the longest one
            so far; in seconds of the clock.
        clock: returns seconds.
        report: gets one line per event.

    Returns:
        All results of the ledger.

    Raises:
        OutOfTime: runs are left because of the deadline.
        RunFailed: a run failed; those under way are finished and kept first.
    """
    plan = list(plan)
    results = ledger.read()
    waiting = [run for run in plan if run not in results]
    done = len(plan) - len(waiting)
    if done:
        report(f'{done} of {len(plan)} runs are already in {ledger.path}')
    longest = max((results[run].seconds for run in plan if run in results), default=0.0)
    running: dict[Future, Run[V]] = {}
    failure: BaseException | None = None
    late = False
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and failure is None and not late:
                    if deadline is not None and clock() + longest > deadline:
                        late = True
                        break
                    run = waiting.pop(0)
                    running[pool.submit(runner, run)] = run
                if not running:
                    break
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    run = running.pop(future)
                    error = future.exception()
                    if error is not None:
                        failure = failure or error
                        report(f'{run.name}: FAILED')
                        continue
                    result = future.result()
                    ledger.add(run, result)
                    done += 1
                    longest = max(longest, result.seconds)
                    left = (len(plan) - done) * longest / jobs / 60
                    report(
                        f'[{done}/{len(plan)}] {run.name}: {result.score:.4g} '
                        f'({result.seconds:.0f} s; at most {left:.0f} min left)'
                    )
        except BaseException:
            runs.stop_all()
            raise
    if failure is not None:
        raise failure
    if late:
        raise OutOfTime(f'{len(waiting)} runs were not started; run the same command again')
    return ledger.read()
