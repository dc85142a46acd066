"""Tables and the figure of a study, from the JSON lines of its runs."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate
from variants import METHODS, TASKS, operations

from idlevit_mm.analysis.results import Line, read_lines

KEYS = ['task', 'method', 'level', 'keep_ratio']


def lines_of(file: Path) -> list[Line]:
    """The finished runs in a file; none if there is no file."""
    return read_lines(file) if file.is_file() else []


def frame_of(lines: Iterable[Line]) -> pd.DataFrame:
    """One row per run: ``KEYS``, seed, score, policy and ratios."""
    rows = []
    for line in lines:
        own, results = line['settings'], dict(seed=line['seed'], score=line['score'])
        settings = dict(policy=own['policy'], ratios=own['keep_ratios'])
        rows.append(line['variant'] | settings | results)
    # A method that was run again replaces its earlier result.
    return pd.DataFrame(rows).drop_duplicates([*KEYS, 'seed'], keep='last')


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per variant: mean score, gain over dense in the same seeds, each seed's score.

    And ``half``, half of the gain's interval of 95 % by Student's t over the paired seeds.
    """
    dense = frame[frame.method == 'dense'].set_index(['task', 'seed']).score
    own = dense.reindex(pd.MultiIndex.from_frame(frame[['task', 'seed']])).to_numpy()
    frame = frame.assign(dense=own, gain=frame.score - own)
    groups = frame.sort_values('seed').groupby(KEYS, dropna=False)
    table = groups.agg(
        score=('score', 'mean'),
        dense=('dense', 'mean'),
        seeds=('score', list),
        gain=('gain', 'mean'),
        half=('gain', lambda gains: stats.t.ppf(0.975, gains.count() - 1) * gains.sem()),
        policy=('policy', list),
        ratios=('ratios', list),
    ).reset_index()
    # All runs of a variant have the same policy and ratios.
    table[['policy', 'ratios']] = table[['policy', 'ratios']].map(lambda values: values[0])
    table['share'] = list(map(operations, table.task, table.policy, table.ratios))
    return table


def variant_table(table: pd.DataFrame, task: str) -> str:
    """The rows of a task in Markdown: dense, then by level and keep ratio, the best first."""
    table = table[~table.method.map(serves)]
    chosen = table.fillna({'level': 0.0, 'keep_ratio': 0.0})
    # Dense has neither.
    chosen['ratio'] = chosen.keep_ratio.where(chosen.method != 'dense', 2.0)
    order = {'level': True, 'ratio': False, 'score': False, 'method': True}
    rows = []
    for row in chosen.sort_values([*order], ascending=[*order.values()]).itertuples():
        dense = row.method == 'dense'
        half = f' ± {row.half:.2f}' if len(row.seeds) > 1 else ''
        cells = [
            row.method,
            f'-{100 * row.level:g} %' if row.level else '–',
            keep_of(row.ratios, row.policy),
            f'{row.share:.3f}',
            f'{row.score:.2f}',
            '–' if dense else f'{row.gain:+.2f}{half}',
            ', '.join(f'{score:.2f}' for score in row.seeds),
        ]
        rows.append(cells)
    columns = ['method', 'level', 'keep', 'multiply-adds', TASKS[task].unit, 'against dense']
    return tabulate(rows, [*columns, 'each seed'], 'pipe', disable_numparse=True)


def keep_of(ratios: float | list[list[float]], policy: Any = None) -> str:
    """Keep ratios as a table has them: the one of all idle blocks, or those of each stage.

    And those of attention, where they are others.
    """
    if attending := (policy or {}).get('attention_ratios'):
        return f'{keep_of(ratios)}; attention {keep_of(attending)}'
    stages = ratios if isinstance(ratios, list) else [[ratios]]
    idle = {ratio for stage in stages for ratio in stage if ratio < 1.0}
    if len(idle) > 1:
        return ', '.join('/'.join(f'{ratio:g}' for ratio in unique(stage)) for stage in stages)
    late = ' from block 1' if idle and stages[0][0] == 1.0 else ''
    return f'{min(idle, default=1.0):g}{late}'


def unique(stage: list[float]) -> list[float]:
    """The ratios of a stage; a single one where all are equal."""
    return stage[:1] if len(set(stage)) == 1 else stage


def serves(method: str) -> bool:
    """Whether a method trains one checkpoint for many ratios."""
    return method in METHODS and METHODS[method].ratios is not None


def ratio_table(table: pd.DataFrame) -> str:
    """Checkpoints for many ratios, a column each: points against dense in the same seeds."""
    served = table[table.method.map(serves)]
    wide = served.pivot(index='keep_ratio', columns='method', values='gain')
    wide = wide.sort_index(ascending=False)
    shares = served.drop_duplicates('keep_ratio').set_index('keep_ratio').share
    rows = [
        [f'{ratio:g}', f'{shares[ratio]:.3f}', *(f'{gain:+.2f}' for gain in gains)]
        for ratio, *gains in wide.itertuples()
    ]
    return tabulate(rows, ['keep', 'multiply-adds', *wide], 'pipe', disable_numparse=True)


def scatter(frame: pd.DataFrame) -> str:
    """A sentence about the spread of runs around the means of their rows."""
    groups = frame[~frame.method.map(serves)].groupby(KEYS, dropna=False).score
    freedom = groups.count().sum() - len(groups)
    if not freedom:
        return ''
    deviation = ((groups.var() * (groups.count() - 1)).sum() / freedom) ** 0.5
    return (
        'One run scatters around the mean of its row with a standard deviation of '
        f'{deviation:.2g} (pooled over all rows).'
    )


def text(frame: pd.DataFrame) -> str:
    """All tables of a study in Markdown."""
    table = means(frame)
    parts = [
        'Means over the seeds on the whole validation set. Every row, the dense one too, was '
        'fine-tuned equally long from the same dense checkpoint. Multiply-adds are those of the '
        'backbone, scoring included, divided by those of the dense one at the same size of image. '
        '"Against dense" is the mean of the differences of each seed, ± half of their interval of '
        "95 % (Student's t)."
    ]
    served = []
    for task in [task for task in TASKS if (frame.task == task).any()]:
        own, rows = frame[frame.task == task], table[table.task == task]
        parts += [f'## {TASKS[task].title} ({task})', variant_table(rows, task), scatter(own)]
        if own.method.map(serves).any():
            served += ['## One checkpoint for many ratios', ratio_table(rows)]
    parts += served
    return '\n\n'.join(part for part in parts if part) + '\n'


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw the scores of policies over multiply-adds, a panel per task, into a file."""
    table = means(frame)
    tasks = [task for task in TASKS if (frame.task == task).any()]
    figure = Figure(figsize=(5.2 * len(tasks), 4.6), layout='constrained')
    handles: dict[str, Any] = {}
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        rows = table[table.task == task]
        for score in rows[rows.method == 'dense'].score:
            handles['dense'] = panel.axhline(score, color='black', linewidth=1)
        rows = rows[rows.level.notna()].sort_values('share')
        for i, (name, method) in enumerate(METHODS.items(), 1):
            points = rows[rows.method == name]
            if len(points):
                style = '-' if method.policy['type'] == 'IdleViT' else '--'
                look = dict(color=f'C{i % 10}', marker='os^Dv<>Ph*'[i % 10], linestyle=style)
                (handles[name],) = panel.plot(points.share, points.score, **look)
        panel.set_title(TASKS[task].title)
        panel.set_xlabel('backbone multiply-adds / dense')
        panel.set_ylabel(f'{TASKS[task].unit} (points of 100)')
        if len(rows):  # wide enough that rows of one level stand above each other
            panel.set_xlim(rows.share.min() - 0.05, rows.share.max() + 0.05)
        panel.grid(alpha=0.3)
    figure.legend(
        list(handles.values()), list(handles), loc='outside lower center', ncols=3 * len(tasks)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', type=Path, help='JSON lines, such as docs/studies/policies.jsonl')
    parser.add_argument('--figure', type=Path, help='draw scores over multiply-adds, for policies')
    args = parser.parse_args()
    frame = frame_of(lines_of(args.file))
    print(text(frame))
    if args.figure:
        draw(frame, args.figure)
