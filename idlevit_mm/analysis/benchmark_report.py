"""Tables, summary and picture of measured cases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from idlevit_mm.analysis.benchmark import table_cells
from idlevit_mm.analysis.measuring import Entry, Result

_MIB = 2**20


def case_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of one case; what failed has its reason instead of figures."""
    rows = [entry.row for entry in result.entries if entry.row is not None]
    header, cells = table_cells(rows)
    by_name = {line[0]: line for line in cells}
    weighed = any(entry.memory is not None for entry in result.entries)
    lines = []
    for entry in result.entries:
        line = by_name.get(entry.label.name)
        if line is None:
            line = [entry.label.name, f'failed: {entry.error}', *[''] * (len(header) - 2)]
        lines.append([*line, *_memory_cells(entry)] if weighed else line)
    return [*header, *(['peak MiB', 'ratio'] if weighed else [])], lines


def _memory_cells(entry: Entry) -> list[str]:
    if entry.memory is None:
        return ['', '']
    ratio = '–' if entry.memory_ratio is None else f'{entry.memory_ratio:.3f}'
    return [f'{entry.memory / _MIB:.1f}', ratio]


@dataclass(frozen=True)
class Summary:
    """Figures of one candidate over all cases of a target.

    Attributes:
        target: preset or config.
        what: part, mode and reference.
        name: of the candidate.
        cases: how many.
        speedup: geometric mean of time of the reference / time of the candidate.
        low: the smallest speed-up and its case.
        high: the largest speed-up and its case.
        realised: geometric mean of the realised share; None if no operation is saved.
    """

    target: str
    what: str
    name: str
    cases: int
    speedup: float
    low: tuple[float, str]
    high: tuple[float, str]
    realised: float | None


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summarize(results: Iterable[Result]) -> list[Summary]:
    """One line for each target, kind of measurement and candidate, the reference left out."""
    groups: dict[tuple[str, str, str], list[tuple[Result, Entry]]] = {}
    for result in results:
        what = f'{result.case.part} {result.case.mode} against {result.reference}'
        for entry in result.entries:
            if entry.row is not None and entry.label.name != result.reference:
                key = result.case.target, what, entry.label.name
                groups.setdefault(key, []).append((result, entry))
    return [_summary(*key, members) for key, members in groups.items()]


def _summary(target: str, what: str, name: str, members: list[tuple[Result, Entry]]) -> Summary:
    speedups = [(speedup(entry), result.case.conditions) for result, entry in members]
    shares = [entry.row.realised for _, entry in members if entry.row is not None]
    known = [share for share in shares if share is not None]
    return Summary(
        target,
        what,
        name,
        len(members),
        geometric_mean([value for value, _ in speedups]),
        min(speedups),
        max(speedups),
        geometric_mean(known) if known else None,
    )


def speedup(entry: Entry) -> float:
    """Time of the reference / time of a candidate that did not fail."""
    assert entry.row is not None
    return 1 / entry.row.time_ratio.median


def summary_table(lines: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the summary."""
    header = ['target', 'measured', 'candidate', 'cases', 'speed-up', 'realised', 'min', 'max']
    return header, [
        [
            line.target,
            line.what,
            line.name,
            str(line.cases),
            f'{line.speedup:.2f}',
            _share(line.realised),
            f'{line.low[0]:.2f} ({line.low[1]})',
            f'{line.high[0]:.2f} ({line.high[1]})',
        ]
        for line in lines
    ]


def _share(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'
