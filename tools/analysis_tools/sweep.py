"""Test one checkpoint at many keep ratios, and time it: accuracy against time and multiply-adds.

Writes lines of JSON, a table and a picture; what the lines have is not measured again.
docs/deploy.md tells what to do with it.
"""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import measures
import numpy as np
import pandas as pd
from trials import Trials, add_options, progress

from idlevit_mm.analysis import flops
from idlevit_mm.analysis.models import idle_backbone
from idlevit_mm.analysis.results import Line, add_line, exit_code
from idlevit_mm.analysis.search import undominated
from idlevit_mm.engine.swap import parse_keep
from idlevit_mm.errors import UsageError

CONFIGURED = 'configured'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    add = parser.add_argument
    keep = 'each for all blocks, or as a list for stages or blocks, in quotes; 1.0 is always there'
    add('--keep', nargs='+', metavar='RATIO', default=['0.9', '0.7', '0.5'], help=keep)
    add('--as-configured', action='store_true', help="the config's own ratios beside them")
    policies = "names, or configs in quotes such as \"{'type': 'EvoViT'}\" (default: the config's)"
    add('--policies', nargs='+', default=[CONFIGURED], metavar='POLICY', help=policies)
    add('--per-stage', action='store_true', help='each in one stage alone (of a ViT one block)')
    add('--int8', action='store_true', help='all of it with linear layers in int8 too')
    out = 'JSON lines; .md and .png are written beside them (default: in the work dir)'
    add('--out', type=Path, help=out)
    return parser.parse_args(argv)


def candidates_of(trials: Trials, args: argparse.Namespace) -> list[tuple[Line, Any]]:
    """Settings as they stand in a line, the reference first, and the models of these settings.

    Raises:
        UsageError: A ratio or policy is not allowed.
    """
    ratios: list[Any] = [parse_keep([word]) for word in args.keep]
    kept: dict[str, tuple[Any, int | None]] = {'1.0': (1.0, None)}
    depths = idle_backbone(trials.model).depths
    lone = depths if len(depths) > 1 else (1,) * depths[0]
    for ratio in ratios:
        if not args.per_stage or not isinstance(ratio, (int, float)):
            kept.setdefault(json.dumps(ratio), (ratio, None))
            continue
        for stage in range(len(lone)) if ratio != 1 else ():
            table = [ratio if at == stage else 1.0 for at in range(len(lone))]
            kept[json.dumps(table)] = table, stage
    if args.as_configured:
        kept.setdefault(CONFIGURED, (None, None))
    found: list[tuple[Line, Any]] = []
    for word in dict.fromkeys(args.policies):
        policy = parse_policy(word)
        model = trials.model if policy == CONFIGURED else trials.of_policy(policy)
        for int8, (keep, stage) in product((False, True)[: 1 + args.int8], kept.values()):
            setting = dict(policy=policy, keep=keep, stage=stage, int8=int8)
            if keep != 1.0 or int8 or not found:
                found.append((setting, trials.variant(keep, model, int8)))
    return found


def parse_policy(word: str) -> Any:
    """A policy as the command line has it: a name, or a config."""
    if not word.startswith('{'):
        return word
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        raise UsageError(f'--policies {word}: allowed are a name, or a dict of Python') from None


def measure(trials: Trials, args: argparse.Namespace, path: Path) -> list[Line]:
    """Time and test what the file of lines has not; the lines of what is asked for."""
    every = candidates_of(trials, args)
    seen = {key_of(line): line for line in trials.read(path)}
    missing = {key_of(own[0]): own for own in every if key_of(own[0]) not in seen}
    print(f'{len(every)} settings, {len(every) - len(missing)} of them in {path}')
    if missing:
        trials.runner  # noqa: B018 (what it finds missing is said before anything is timed)
        reference = every[0]
        calls = {key: trials.call(model) for key, (_, model) in missing.items()}
        calls.setdefault(key_of(reference[0]), trials.call(reference[1]))
        seconds = trials.seconds(calls)
    for key in progress(missing, lambda key: title_of(missing[key][0])):
        setting, model = missing[key]
        name, score = trials.score(metrics := trials.metrics(model))
        times = measures.spread(seconds[key], 1e-3)
        line = dict(trials.about, **setting, score_name=name, score=score, metrics=metrics)
        line |= dict(multiply_adds=trials.multiply_adds(model), ms=times[0], ms_quartiles=times[1:])
        line['time'] = measures.spread(seconds[key], seconds[key_of(reference[0])])[0]
        add_line(line, path)
        seen[key] = line
        print(
            f'  {name} {score:.4g}, {line["ms"]:.1f} ms, {line["time"]:.2f} of keep 1.0', flush=True
        )
    return [seen[key_of(setting)] for setting, _ in every]


def key_of(line: Line) -> str:
    """What tells settings apart."""
    return json.dumps([line[key] for key in ('policy', 'keep', 'int8')])


def title_of(line: Line) -> str:
    """A setting in a few words."""
    keep = CONFIGURED if line['keep'] is None else line['keep']
    return f'{name_of(line)}, keep {keep}'


def name_of(line: Line) -> str:
    """The curve that a setting is on."""
    policy = line['policy'] if isinstance(line['policy'], str) else json.dumps(line['policy'])
    return f'{policy}, int8' if line['int8'] else policy


def table_of(lines: Sequence[Line]) -> str:
    """A row for each setting; those that no other one beats in score and time have a star."""
    times, scores = (np.array([line[key] for line in lines]) for key in ('ms', 'score'))
    best = undominated(times, -scores)
    rows = [
        {
            'policy': name_of(line),
            'keep': CONFIGURED if line['keep'] is None else str(line['keep']),
            line['score_name']: f'{line["score"]:.4g}',
            'multiply-adds': flops.pretty(line['multiply_adds']),
            'ms': f'{line["ms"]:.1f}',
            'time / keep 1.0': f'{line["time"]:.2f}',
            'best': '*' if index in best else '',
        }
        for index, line in enumerate(lines)
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draw scores over time, a curve per policy; and over the ratio of one stage alone."""
    from matplotlib.figure import Figure

    table = pd.DataFrame(lines).assign(name=[name_of(line) for line in lines])
    single = table[table['stage'].notna()]
    figure = Figure(figsize=(7.5 if single.empty else 14, 5), layout='constrained')
    axes, *other = figure.subplots(1, 1 if single.empty else 2, squeeze=False)[0]
    for name, own in table[table['stage'].isna()].groupby('name', sort=False):
        own = own.sort_values('ms')
        axes.plot(own['ms'], own['score'], 'o-', label=name)
        for _, row in own.iterrows():
            axes.annotate(str(row['keep'] or CONFIGURED), (row['ms'], row['score']), fontsize=7)
    if not single.empty:
        axes.plot(single['ms'], single['score'], '.', color='0.6', label='one stage')
    best = table.iloc[undominated(table['ms'].to_numpy(), -table['score'].to_numpy())]
    axes.step(best['ms'], best['score'], '--', color='0.7', where='post', label='best')
    axes.set(xlabel='milliseconds', ylabel=lines[0]['score_name'])
    for (name, stage), own in single.groupby(['name', 'stage']):
        (panel,), ratios = other, [min(keep) for keep in own['keep']]
        panel.plot(ratios, own['score'], 'o-', label=f'{name}, stage {stage + 1:.0f}')
        panel.set(xlabel='keep ratio of the stage, 1 in the others', ylabel=lines[0]['score_name'])
    for panel in (axes, *other):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


@exit_code
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    args = parse_args(argv)
    trials = Trials(args)
    path = args.out or trials.work_dir / 'sweep.jsonl'
    if path.suffix != '.jsonl':
        raise UsageError(f'--out {path} must end in .jsonl')
    lines = measure(trials, args, path)
    text = f'{table_of(lines)}\n\n{trials.origin("tools/analysis_tools/sweep.py", argv)}\n'
    path.with_suffix('.md').write_text(text, encoding='utf-8')
    plot(lines, path.with_suffix('.png'))
    print('', text, f'{path.with_suffix(".md")}, {path.with_suffix(".png")}', sep='\n')


if __name__ == '__main__':
    sys.exit(main())
