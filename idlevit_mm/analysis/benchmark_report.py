"""Tables and summary of measured cases, for the terminal and for the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from idlevit_mm.analysis.flops import pretty
from idlevit_mm.analysis.latency import Spread
from idlevit_mm.analysis.measuring import Entry, Result

_MIB = 2**20
_CASE_HEADER = [
    *('', 'ms/image', 'quartiles', 'speed-up', 'quartiles', 'multiply-adds', 'ratio', 'realised'),
]
ALL_TARGETS = 'all'

Cells = tuple[list[str], list[list[str]]]


def speedup(entry: Entry) -> Spread:
    """Time of the reference / time of a candidate that did not fail."""
    assert entry.row is not None
    ratio = entry.row.time_ratio
    return Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def case_table(result: Result) -> Cells:
    """Header and cells of the table of one case; what failed has its reason below the table."""
    weighed = any(entry.memory is not None for entry in result.entries)
    header = [*_CASE_HEADER, *(['peak MiB', 'ratio'] if weighed else [])]
    return header, [_line(entry, weighed) for entry in result.entries]


def failures(result: Result) -> list[str]:
    """One line for each candidate of a case that failed."""
    return [
        f'{entry.label.name} failed: {entry.error}' for entry in result.entries if entry.row is None
    ]


def _line(entry: Entry, weighed: bool) -> list[str]:
    row = entry.row
    if row is None:
        return [entry.label.name, 'failed', *[''] * (len(_CASE_HEADER) - 2 + 2 * weighed)]
    faster = speedup(entry)
    line = [
        entry.label.name,
        f'{row.milliseconds.median:.2f}',
        f'{row.milliseconds.low:.2f}–{row.milliseconds.high:.2f}',
        f'{faster.median:.3f}',
        f'{faster.low:.3f}–{faster.high:.3f}',
        pretty(row.multiply_adds),
        f'{row.operation_ratio:.3f}',
        _share(row.realised),
    ]
    if weighed:
        line.append('–' if entry.memory is None else f'{entry.memory / _MIB:.1f}')
        line.append('–' if entry.memory_ratio is None else f'{entry.memory_ratio:.3f}')
    return line


def _share(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


# --- Summary ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Figures of one candidate over all cases of a target.

    Attributes:
        target: preset or config, or ``ALL_TARGETS``.
        what: part, mode, compilation and reference.
        name: of the candidate.
        cases: how many.
        speedup: geometric mean of time of the reference / time of the candidate.
        low: the smallest speed-up and its case.
        high: the largest speed-up and its case.
        realised: geometric mean of the realised share, with its smallest and largest value; None
            if no case saves operations.
    """

    target: str
    what: str
    name: str
    cases: int
    speedup: float
    low: tuple[float, str]
    high: tuple[float, str]
    realised: tuple[float, float, float] | None


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summarize(results: Iterable[Result]) -> list[Summary]:
    """One line for each target, kind of measurement and candidate, the reference left out.

    Where there are several targets, lines over all of them follow.
    """
    groups: dict[tuple[str, str, str], list[tuple[Result, Entry]]] = {}
    everything: dict[tuple[str, str, str], list[tuple[Result, Entry]]] = {}
    for result in results:
        for entry in result.entries:
            if entry.row is not None and entry.label.name != result.reference:
                what, name = _what(result), entry.label.name
                member = result, entry
                groups.setdefault((result.case.target, what, name), []).append(member)
                everything.setdefault((ALL_TARGETS, what, name), []).append(member)
    for key, members in everything.items():
        if len({result.case.target for result, _ in members}) > 1:
            groups[key] = members
    return [_summary(*key, members) for key, members in groups.items()]


def _what(result: Result) -> str:
    case = result.case
    compiled = '' if case.compile == 'none' else f', compile {case.compile}'
    return f'{case.part} {case.mode}{compiled}, against {result.reference}'


def _summary(target: str, what: str, name: str, members: list[tuple[Result, Entry]]) -> Summary:
    speedups = []
    for result, entry in members:
        conditions = result.case.conditions
        if target == ALL_TARGETS:
            conditions = f'{result.case.target}, {conditions}'
        speedups.append((speedup(entry).median, conditions))
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
        (geometric_mean(known), min(known), max(known)) if known else None,
    )


def summary_table(lines: Sequence[Summary]) -> Cells:
    """Header and cells of the summary; its first three columns are texts."""
    header = [
        *('target', 'measured', 'candidate', 'cases', 'speed-up', 'slowest', 'fastest'),
        *('realised', 'range'),
    ]
    cells = []
    for line in lines:
        mean, low, high = line.realised or (None, None, None)
        cells.append(
            [
                line.target,
                line.what,
                line.name,
                str(line.cases),
                f'{line.speedup:.2f}',
                f'{line.low[0]:.2f} ({line.low[1]})',
                f'{line.high[0]:.2f} ({line.high[1]})',
                _share(mean),
                '–' if mean is None else f'{_share(low)}–{_share(high)}',
            ]
        )
    return header, cells


# --- Markdown ---------------------------------------------------------------------------------

_CAPTION = (
    'Speed-up is the median of time of the reference / time of the candidate in the same round; in '
    'brackets the realised share: speed-up / (multiply-adds of the reference / multiply-adds of '
    'the candidate).'
)


def markdown(results: Sequence[Result], about: Sequence[str] = ()) -> str:
    """All cases as tables for the documentation, one row per case, and the summary.

    Args:
        results: the cases; each part, reference and device gets a table of its own.
        about: lines that tell how it was measured.
    """
    lines = [_CAPTION, '', *(f'- {line}' for line in about), *([''] if about else [])]
    tables: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        case = result.case
        place = case.device if case.device != 'cpu' else f'CPU, {case.threads} threads'
        tables.setdefault((f'{case.part}, {place}', result.reference or ''), []).append(result)
    for (title, reference), members in tables.items():
        lines += [f'**{title}, against {reference or "nothing: the reference failed"}**', '']
        lines += _markdown_table(*_condensed(members)) + ['']
    summary = summarize(results)
    if summary:
        header, cells = summary_table(summary)
        lines += ['**Geometric means**', '', *_markdown_table(header, cells), '']
    return '\n'.join(lines)


def _condensed(results: Sequence[Result]) -> Cells:
    """One line per case with its conditions and what each candidate gains."""
    header = ['model', 'shape', 'batch', 'mode', 'dtype']
    compiles = any(result.case.compile != 'none' for result in results)
    layouts = any(result.case.channels_last for result in results)
    header += ['compile'] * compiles + ['layout'] * layouts
    names: dict[str, None] = {}
    for result in results:
        for entry in result.entries:
            if entry.label.name != result.reference:
                names.setdefault(entry.label.name)
    cells = []
    for result in results:
        case = result.case
        line = [case.target, f'{case.shape[0]}×{case.shape[1]}', str(case.batch)]
        line += [case.mode, case.dtype]
        line += [case.compile] * compiles
        line += ['channels last' if case.channels_last else ''] * layouts
        entries = {entry.label.name: entry for entry in result.entries}
        cells.append([*line, *(_gain(entries.get(name)) for name in names)])
    return [*header, *names], cells


def _gain(entry: Entry | None) -> str:
    if entry is None:
        return ''
    if entry.row is None:
        return 'failed'
    share = entry.row.realised
    return f'{speedup(entry).median:.2f}' + ('' if share is None else f' ({share:.2f})')


def _markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rows = [header, ['---'] * len(header), *cells]
    return ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows]
