"""The file of ``benchmark.py``, JSON lines with a run or a case each; its tables and picture."""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from idlevit_mm.analysis.results import Line, add_line, read_lines
from idlevit_mm.errors import UsageError

# A line is a run (command, machine, versions, notes) or a case (its conditions, and candidates).

CONDITIONS = ['target', 'part', 'shape', 'batch', 'dtype', 'mode', 'compile', 'device', 'threads']
# Of a candidate in a case: milliseconds per image, and time divided by the reference's in the same
# round; median, first and third quartile.
TIMES = ('ms', 'ms_low', 'ms_high', 'ratio', 'ratio_low', 'ratio_high')
_CAPTION = (
    'Speed-up is the median of time of the reference / time of the candidate in the same round; in '
    'brackets the realised share: speed-up / (multiply-adds of the reference / multiply-adds of '
    'the candidate).'
)
# Of the table of a case: column, title, format; those of memory last.
_COLUMNS = (
    *(('name', '', ''), ('ms', 'ms/image', '.2f'), ('ms_low', '25 %', '.2f')),
    *(('ms_high', '75 %', '.2f'), ('rate', 'images/s', '.1f')),
    *(('speedup', 'speed-up', '.3f'), ('slow', '25 %', '.3f')),
    *(('fast', '75 %', '.3f'), ('multiply_adds', 'G multiply-adds', '.3f')),
    *(('operations', 'ratio', '.3f'), ('realised', 'realised', '.2f')),
    *(('memory', 'peak MiB', '.1f'), ('memory_ratio', 'ratio', '.3f')),
)


def read(path: Path) -> list[Line]:
    """Read a file of the benchmark; of cases of the same conditions the last.

    Raises:
        UsageError: There is no such file, or it is another one.
    """
    try:
        lines = read_lines(path, key_of)
        about(lines)
    except OSError as error:
        raise UsageError(f'{path} cannot be read: {error.strerror}') from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path} is not a file that this tool wrote') from error
    return lines


def add(lines: list[Line], line: Line, path: Path | None) -> None:
    """Add a run or a case to what was measured and to its file."""
    lines[:] = [known for known in lines if key_of(known) != key_of(line)] + [line]
    if path is not None:
        add_line(line, path)


def key_of(line: Line) -> str:
    """The conditions of a case, or all of a run, as one text."""
    return json.dumps([line[name] for name in CONDITIONS] if 'target' in line else line)


def about(lines: Iterable[Line]) -> list[str]:
    """Machines, versions and notes of all runs, each once."""
    runs = [line for line in lines if 'target' not in line]
    texts = [[f'{run["machine"]}; {run["versions"]}', *run['notes']] for run in runs]
    return list(dict.fromkeys(chain.from_iterable(texts)))


def is_measured(lines: Iterable[Line], case: Line, names: Iterable[str]) -> bool:
    """Whether a case is there with these candidates, none of them failed."""
    found = [line['candidates'] for line in lines if key_of(line) == key_of(case)]
    errors = {candidate['name']: candidate['error'] for candidate in chain(*found)}
    return errors.keys() >= set(names) and not any(errors.values())


def rows_of(lines: Iterable[Line]) -> pd.DataFrame:
    """One row per candidate and case, with ratios to the reference of the case.

    Raises:
        UsageError: There is no case.
    """
    rows = pd.DataFrame(
        {**case, **candidate, 'case': index}
        for index, case in enumerate(lines)
        for candidate in case.get('candidates', ())
    )
    if rows.empty:
        raise UsageError('there is no case that was measured')
    rows = rows.astype(dict.fromkeys((*TIMES, 'multiply_adds', 'memory'), float))
    rows['is_reference'] = rows['name'] == rows['reference']
    base = rows[rows['is_reference']].set_index('case')
    rows['operations'] = rows['multiply_adds'] / rows['case'].map(base['multiply_adds'])
    rows['memory_ratio'] = rows['memory'] / rows['case'].map(base['memory'])
    rows['rate'] = 1000 / rows['ms']
    rows[['speedup', 'slow', 'fast']] = 1 / rows[['ratio', 'ratio_high', 'ratio_low']].to_numpy()
    share = rows['speedup'] * rows['operations']
    rows['realised'] = share.where(rows['operations'] < 0.995)
    rows['shape'] = rows['shape'].map(lambda shape: f'{shape[0]}×{shape[1]}')
    threads = 'CPU, ' + rows['threads'].astype(str) + ' threads'
    rows['place'] = rows['device'].where(rows['device'] != 'cpu', threads)
    compiled = (', compile ' + rows['compile']).where(rows['compile'] != 'none', '')
    rows['what'] = rows['part'] + ' ' + rows['mode'] + compiled
    return rows


def case_table(case: Line) -> str:
    """A case for the terminal, and why candidates failed."""
    rows = rows_of([case])
    rows['multiply_adds'] /= 1e9
    rows['memory'] /= 2**20
    shown = _COLUMNS[: -2 if rows['memory'].isna().all() else None]
    table = rows[[name for name, _, _ in shown]].set_axis([title for _, title, _ in shown], axis=1)
    conditions = ', '.join(rows[part][0] for part in ('what', 'dtype', 'shape', 'place'))
    title = f'{case["target"]} {conditions}, batch {case["batch"]}, {case["rounds"]} rounds, '
    failed = [f'{c["name"]} failed: {c["error"]}' for c in case['candidates'] if c['error']]
    text = markdown(table, [form for _, _, form in shown])
    return '\n'.join([title + f'against {case["reference"]}', text, *failed, ''])


def summary(lines: Iterable[Line]) -> str:
    """Geometric means of each candidate over the cases of a target, and over all targets."""
    rows = rows_of(lines)
    rows = rows[~rows['is_reference'] & rows['speedup'].notna()]
    kind = ['what', 'reference', 'name']
    shared = rows.groupby(kind)['target'].transform('nunique') > 1
    rows = pd.concat([rows, rows[shared].assign(target='all')])
    table = rows.groupby(['target', *kind], sort=False).agg(
        {name: [geometric_mean, 'min', 'max'] for name in ('speedup', 'realised')}
        | {'case': 'size'}
    )
    table.columns = ['speedup', 'slowest', 'fastest', 'realised', 'lowest', 'highest', 'cases']
    table.insert(0, 'cases', table.pop('cases'))
    table.index.names = ['target', 'measured', 'against', 'candidate']
    return markdown(table.reset_index(), [*[''] * 5, *['.2f'] * 6])


def document(lines: Iterable[Line]) -> str:
    """Tables for a document: a row per case, one table per part, place and reference; a summary."""
    rows = rows_of(lines)
    index = ['target', 'shape', 'batch', 'mode', 'dtype', 'compile']
    if (rows['compile'] == 'none').all():
        index.remove('compile')
    share = rows['realised'].map(' ({:.2f})'.format).where(rows['realised'].notna(), '')
    rows['gain'] = rows['speedup'].map('{:.2f}'.format) + share
    rows['gain'] = rows['gain'].where(rows['speedup'].notna(), 'failed')
    texts = [_CAPTION, '', *(f'- {line}' for line in about(lines)), '']
    others = rows[~rows['is_reference']].groupby(['part', 'place', 'reference'], sort=False)
    for (part, place, reference), group in others:
        table = group.pivot(index=['case', *index], columns='name', values='gain').fillna('')
        table = table[group['name'].unique()].reset_index(index)
        shown = table.to_markdown(index=False, disable_numparse=True)
        texts += [f'**{part}, {place}, against {reference}**', '', shown, '']
    return '\n'.join([*texts, '**Geometric means**', '', summary(lines), ''])


def markdown(table: pd.DataFrame, formats: Sequence[str]) -> str:
    """A table with a format for each column."""
    table = table.astype(object).where(table.notna(), None)
    return table.to_markdown(index=False, floatfmt=formats, missingval='–')


def geometric_mean(values: Any) -> float:
    """The n-th root of the product of n positive values, those that are not known left out."""
    return float(np.exp(np.log(values).mean()))


def points_of(lines: Iterable[Line]) -> pd.DataFrame:
    """Points of the picture, a row each: panel, line, name, operations, speedup.

    Raises:
        UsageError: No keep ratio was measured against a reference.
    """
    rows = rows_of(lines)
    rows = rows[rows['kind'].isin(['idle', 'dense']) & rows['speedup'].notna()]
    rows = rows[~rows['is_reference']].copy()
    if rows.empty:
        raise UsageError('--plot: no keep ratio was measured against a reference')
    # A name may say more than the ratio.
    rows['line'] = rows['target'] + rows['name'].str.replace(r'keep \S+', '', regex=True)
    rows['panel'] = rows['what'] + ', ' + rows['dtype'] + ', ' + rows['place']
    return rows[['panel', 'line', 'name', 'operations', 'speedup']]


def plot(lines: Iterable[Line], path: Path) -> None:
    """Draw a panel per kind of measurement, a line per model through means, both axes logarithmic.

    Raises:
        UsageError: No keep ratio was measured against a reference.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = points_of(lines)
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
