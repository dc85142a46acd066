"""The file of ``benchmark.py``, JSON lines with a run or a case each; its tables and picture."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from idlevit_mm.errors import UsageError

Case = dict[str, Any]

CONDITIONS = ['target', 'part', 'shape', 'batch', 'dtype', 'mode', 'compile', 'device', 'threads']
# Of a candidate in a case: milliseconds per image, and time divided by the reference's in the same
# round; median, first and third quartile.
TIMES = ('ms', 'ms_low', 'ms_high', 'ratio', 'ratio_low', 'ratio_high')
_CAPTION = (
    'Speed-up is the median of time of the reference / time of the candidate in the same round; in '
    'brackets the realised share: speed-up / (multiply-adds of the reference / multiply-adds of '
    'the candidate).'
)


class Record(NamedTuple):
    """What was measured.

    Attributes:
        runs: Command, machine, versions and notes of each run that added cases.
        cases: By their conditions, in the order measured; of the same conditions the last.
    """

    runs: list[dict[str, Any]]
    cases: dict[str, Case]

    def about(self) -> list[str]:
        """Machines, versions and notes of all runs, each once."""
        lines = [[f'{run["machine"]}; {run["versions"]}', *run['notes']] for run in self.runs]
        return list(dict.fromkeys(line for own in lines for line in own))

    def add(self, line: dict[str, Any], path: Path | None = None) -> None:
        """Add a run or a case, also to a file."""
        if 'candidates' in line:
            self.cases[key_of(line)] = line
        else:
            self.runs.append(line)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open('a', encoding='utf-8') as file:
                print(json.dumps(line, ensure_ascii=False), file=file)

    def has(self, case: Case, names: Iterable[str]) -> bool:
        """Whether a case is there with these candidates, none of them failed."""
        found = self.cases.get(key_of(case), {'candidates': []})['candidates']
        errors = {candidate['name']: candidate['error'] for candidate in found}
        return errors.keys() >= set(names) and not any(errors.values())


def read(path: Path) -> Record:
    """Read a file of the benchmark.

    Raises:
        UsageError: There is no such file, or it is another one.
    """
    record = Record([], {})
    try:
        for line in path.read_text(encoding='utf-8').splitlines():
            record.add(json.loads(line))
        record.about()
    except OSError as error:
        raise UsageError(f'{path} cannot be read: {error.strerror}') from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path} is not a file that this tool wrote') from error
    return record


def read_all(paths: Iterable[Path]) -> Record:
    """Read several files; cases of the same conditions in two of them are two."""
    records = {path: read(path) for path in paths}
    cases = {f'{p} {key}': case for p, own in records.items() for key, case in own.cases.items()}
    return Record([run for own in records.values() for run in own.runs], cases)


def key_of(case: Case) -> str:
    """The conditions of a case as one text."""
    return json.dumps([case[name] for name in CONDITIONS])


def rows_of(cases: Iterable[Case]) -> pd.DataFrame:
    """One row per candidate and case, with ratios to the reference of the case.

    Raises:
        UsageError: There is no case.
    """
    cases = list(cases)
    if not cases:
        raise UsageError('there is no case that was measured')
    rows = pd.DataFrame(
        {**case, **candidate, 'case': index}
        for index, case in enumerate(cases)
        for candidate in case['candidates']
    )
    numbers = [*TIMES, 'multiply_adds', 'memory']
    rows[numbers] = rows[numbers].astype(float)
    rows['is_reference'] = rows['name'] == rows['reference']
    base = rows[rows['is_reference']].set_index('case')
    rows['operations'] = rows['multiply_adds'] / rows['case'].map(base['multiply_adds'])
    rows['memory_ratio'] = rows['memory'] / rows['case'].map(base['memory'])
    rows['speedup'], rows['slow'] = 1 / rows['ratio'], 1 / rows['ratio_high']
    rows['fast'] = 1 / rows['ratio_low']
    share = rows['speedup'] * rows['operations']
    rows['realised'] = share.where(rows['operations'] < 0.995)
    rows['shape'] = rows['shape'].map(lambda shape: f'{shape[0]}×{shape[1]}')
    cpu = rows['device'] == 'cpu'
    rows['place'] = rows['device'].where(~cpu, 'CPU, ' + rows['threads'].astype(str) + ' threads')
    compiled = (', compile ' + rows['compile']).where(rows['compile'] != 'none', '')
    rows['what'] = rows['part'] + ' ' + rows['mode'] + compiled
    return rows


def case_table(case: Case) -> str:
    """A case for the terminal, and why candidates failed."""
    rows = rows_of([case])
    rows['multiply_adds'] /= 1e9
    rows['memory'] /= 2**20
    columns = ['name', *TIMES[:3], 'speedup', 'slow', 'fast', 'multiply_adds', 'operations']
    columns += ['realised', 'memory', 'memory_ratio'][: 1 if rows['memory'].isna().all() else 3]
    titles = ['', 'ms/image', '25 %', '75 %', 'speed-up', '25 %', '75 %', 'G multiply-adds']
    titles += ['ratio', 'realised', 'peak MiB', 'ratio']
    forms = ['', *['.2f'] * 3, *['.3f'] * 5, '.2f', '.1f', '.3f']
    table = rows[columns].set_axis(titles[: len(columns)], axis=1)
    conditions = ', '.join(rows[part][0] for part in ('what', 'dtype', 'shape', 'place'))
    title = f'{case["target"]} {conditions}, batch {case["batch"]}, {case["rounds"]} rounds, '
    failed = [f'{c["name"]} failed: {c["error"]}' for c in case['candidates'] if c['error']]
    shown = markdown(table, forms[: len(columns)])
    return '\n'.join([title + f'against {case["reference"]}', shown, *failed, ''])


def summary(record: Record) -> str:
    """Geometric means of each candidate over the cases of a target, and over all targets."""
    rows = rows_of(record.cases.values())
    rows = rows[~rows['is_reference'] & rows['speedup'].notna()]
    kind = ['what', 'reference', 'name']
    shared = rows.groupby(kind)['target'].transform('nunique') > 1
    rows = pd.concat([rows, rows[shared].assign(target='all')])
    table = rows.groupby(['target', *kind], sort=False).agg(
        cases=('case', 'size'),
        speedup=('speedup', geometric_mean),
        slowest=('speedup', 'min'),
        fastest=('speedup', 'max'),
        realised=('realised', geometric_mean),
        lowest=('realised', 'min'),
        highest=('realised', 'max'),
    )
    table.index.names = ['target', 'measured', 'against', 'candidate']
    return markdown(table.reset_index(), [*[''] * 5, *['.2f'] * 6])


def document(record: Record) -> str:
    """Tables for a document: a row per case, one table per part, place and reference; a summary."""
    rows = rows_of(record.cases.values()).fillna({'reference': 'nothing: the reference failed'})
    index = ['target', 'shape', 'batch', 'mode', 'dtype', 'compile']
    if (rows['compile'] == 'none').all():
        index.remove('compile')
    share = rows['realised'].map(' ({:.2f})'.format).where(rows['realised'].notna(), '')
    rows['gain'] = rows['speedup'].map('{:.2f}'.format) + share
    rows['gain'] = rows['gain'].where(rows['speedup'].notna(), 'failed')
    lines = [_CAPTION, '', *(f'- {line}' for line in record.about()), '']
    others = rows[~rows['is_reference']].groupby(['part', 'place', 'reference'], sort=False)
    for (part, place, reference), group in others:
        table = group.pivot(index=['case', *index], columns='name', values='gain').fillna('')
        table = table[group['name'].unique()].reset_index(index)
        shown = table.to_markdown(index=False, disable_numparse=True)
        lines += [f'**{part}, {place}, against {reference}**', '', shown, '']
    return '\n'.join([*lines, '**Geometric means**', '', summary(record), ''])


def markdown(table: pd.DataFrame, formats: Sequence[str]) -> str:
    """A table with a format for each column."""
    table = table.astype(object).where(table.notna(), None)
    return table.to_markdown(index=False, floatfmt=formats, missingval='–')


def geometric_mean(values: Any) -> float:
    """The n-th root of the product of n positive values, those that are not known left out."""
    return float(np.exp(np.log(values).mean()))


def points_of(record: Record) -> pd.DataFrame:
    """Points of the picture, a row each: panel, line, name, operations, speedup.

    Raises:
        UsageError: No keep ratio was measured against a reference.
    """
    rows = rows_of(record.cases.values())
    rows = rows[rows['kind'].isin(['idle', 'dense']) & rows['speedup'].notna()]
    rows = rows[~rows['is_reference']]
    if rows.empty:
        raise UsageError('--plot: no keep ratio was measured against a reference')
    # All scopes are the same where every token is kept.
    scopes = rows[rows['kind'] == 'idle'].groupby('case')['scope'].unique()
    known = rows['case'].map(scopes).where(rows['kind'] == 'dense', rows['scope'])
    rows = rows.assign(scope=known).explode('scope', ignore_index=True)
    rows['line'] = rows['target'] + (', ' + rows['scope']).fillna('')
    rows['panel'] = rows['what'] + ', ' + rows['dtype'] + ', ' + rows['place']
    return rows[['panel', 'line', 'name', 'operations', 'speedup']]


def plot(record: Record, path: Path) -> None:
    """Draw a panel per kind of measurement, a line per model through means, both axes logarithmic.

    Raises:
        UsageError: No keep ratio was measured against a reference.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = points_of(record)
    panels = points.groupby('panel', sort=False)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns + 1.8, 4.6 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).flat
    colours = {line: f'C{index % 10}' for index, line in enumerate(points['line'].unique())}
    handles: dict[str, Any] = {}
    for axes, (title, panel) in zip(grid, panels, strict=False):
        left = min(0.95 * panel['operations'].min(), 0.9)
        label = 'every saved operation\nis saved time'
        (handles[label],) = axes.plot([1, left], [1, 1 / left], '--', color='0.45')
        axes.axhline(1, color='0.8', linewidth=0.8, zorder=0)
        for line, own in panel.groupby('line', sort=False):
            means = own.groupby('name')[['operations', 'speedup']].agg(geometric_mean)
            means = means.sort_values('operations')
            axes.plot(own['operations'], own['speedup'], 'o', color=colours[line], alpha=0.25)
            (handles[line],) = axes.plot(*means.to_numpy().T, 'o-', color=colours[line])
        axes.set(xscale='log', yscale='log', xlim=(1.03 * max(1, panel['operations'].max()), left))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel('multiply-adds left, share of the reference')
        axes.set_ylabel('speed-up against the reference')
        axes.grid(alpha=0.3)
        for axis, text in ((axes.xaxis, '{:.0%}'), (axes.yaxis, '{:.3g}×')):
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
            axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text.format(value)))
            axis.set_minor_formatter(NullFormatter())
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(list(handles.values()), list(handles), loc='outside right upper', fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
