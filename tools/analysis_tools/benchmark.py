"""Time presets, configs and keep ratios in turns, in one process, against the dense backbone.

Every candidate is timed once per round and ratios are formed within rounds, so that a slow spell
of the machine hits all of them. The realised share tells how much of the saved multiply-adds is
saved time: 1 means all of it. docs/benchmark.md explains every option.
"""

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table

from idlevit_mm.analysis import benchmark_report as report
from idlevit_mm.analysis.benchmark_plot import plot
from idlevit_mm.analysis.candidates import SCOPES, Choice, Target, load_target, together
from idlevit_mm.analysis.cases import COMPILES, DTYPES, MODES, PARTS, expand
from idlevit_mm.analysis.measuring import Effort, Result, measure
from idlevit_mm.analysis.models import parse_shapes
from idlevit_mm.analysis.presets import PRESETS
from idlevit_mm.analysis.results import Results
from idlevit_mm.errors import UsageError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'targets', nargs='*', help=f'config files, or presets: {", ".join(PRESETS)}'
    )
    what = parser.add_argument_group('what is compared')
    what.add_argument(
        '--keep-ratios',
        nargs='+',
        type=float,
        help='each target with each (default: presets 1.0 0.7 0.5, configs as they are)',
    )
    what.add_argument(
        '--scopes', nargs='+', metavar='SCOPE', help=f'of the policy: {", ".join(SCOPES)}'
    )
    what.add_argument('--timm', action='store_true', help="timm's twin takes part")
    what.add_argument(
        '--no-host', action='store_true', help='leave the dense class of mmdet or mmseg out'
    )
    what.add_argument(
        '--together', action='store_true', help='all targets in one case, against the first'
    )
    what.add_argument(
        '--checkpoints', nargs='+', type=Path, help='one per config (default: random weights)'
    )
    what.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides of configs')
    how = parser.add_argument_group('conditions; of lists, all combinations')
    how.add_argument('--part', default='backbone', metavar='PART', help=', '.join(PARTS))
    how.add_argument(
        '--mode', nargs='+', default=['inference'], metavar='MODE', help=', '.join(MODES)
    )
    how.add_argument('--shapes', nargs='+', default=['800x1280'], metavar='HxW')
    how.add_argument('--batches', nargs='+', type=int, default=[1])
    how.add_argument(
        '--dtypes', nargs='+', default=['float32'], metavar='DTYPE', help=', '.join(DTYPES)
    )
    how.add_argument(
        '--compile', nargs='+', default=['none'], metavar='MODE', help=', '.join(COMPILES)
    )
    how.add_argument('--channels-last', action='store_true', help='images and weights')
    how.add_argument('--threads', type=int, help='computing threads')
    how.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    effort = parser.add_argument_group('effort')
    effort.add_argument('--rounds', type=int, default=30)
    effort.add_argument('--warmup', type=int, default=3, help='untimed calls of each candidate')
    effort.add_argument('--max-seconds', type=float, help='per case, after three rounds')
    effort.add_argument(
        '--memory', action='store_true', help='peak memory on the CPU too (on CUDA always)'
    )
    out = parser.add_argument_group('results')
    out.add_argument('--out', type=Path, help='JSON file, saved after every case')
    out.add_argument('--resume', action='store_true', help='measure only what --out has not')
    out.add_argument(
        '--from', dest='sources', nargs='+', type=Path, help='show JSON files, measure nothing'
    )
    out.add_argument('--markdown', type=Path, help='write tables for a document')
    out.add_argument('--plot', type=Path, help='draw speed-up against multiply-adds (PNG)')
    return parser.parse_args(argv)


def show(console: Console, title: str, cells: tuple[list[str], list[list[str]]], left: int) -> None:
    """Print a table whose first columns are texts and whose others are figures."""
    # A table's own title would be broken where the table ends.
    console.print(title, style='bold', highlight=False, markup=False, soft_wrap=True)
    table = Table()
    for index, name in enumerate(cells[0]):
        table.add_column(name, justify='left' if index < left else 'right')
    for line in cells[1]:
        table.add_row(*line)
    console.print(table)


def run(args: argparse.Namespace, console: Console, argv: list[str] | None = None) -> Results:
    """Check everything, then measure case by case."""
    if not args.targets:
        raise UsageError(f'name a config file or a preset: {", ".join(PRESETS)}')
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f'--threads {args.threads}: must be at least 1')
        torch.set_num_threads(args.threads)
    conditions = dict(
        part=args.part,
        shapes=parse_shapes(args.shapes),
        batches=args.batches,
        dtypes=args.dtypes,
        modes=args.mode,
        compiles=args.compile,
        device=args.device,
        threads=torch.get_num_threads(),
        channels_last=args.channels_last,
    )
    expand(args.targets, **conditions)
    effort = Effort(args.rounds, args.warmup, args.max_seconds, args.memory)
    effort.check()
    results = opened(args)
    targets = load_targets(args)
    for note in (note for target in targets for note in target.notes):
        console.print(f'note: {note}', highlight=False, markup=False, soft_wrap=True)
    results.begin(sys.argv[1:] if argv is None else argv, args.device, targets)
    by_name = {target.name: target for target in targets}
    counts: dict = {}
    for case in expand(list(by_name), **conditions):
        candidates = by_name[case.target].candidates
        if args.resume and results.has(case, [c.label.name for c in candidates]):
            continue
        result = measure(case, candidates, effort, counts=counts)
        results.add(result)
        if args.out is not None:
            results.save(args.out)
        show_case(console, result)
    return results


def opened(args: argparse.Namespace) -> Results:
    """The results that are there already, or none."""
    if args.out is None or not args.out.exists():
        return Results()
    if not args.resume:
        raise UsageError(f'--out {args.out} exists: add --resume to continue it, or move it away')
    return Results.load(args.out)


def load_targets(args: argparse.Namespace) -> list[Target]:
    """Build all models."""
    checkpoints = args.checkpoints or [None] * len(args.targets)
    if len(checkpoints) != len(args.targets):
        raise UsageError(
            f'--checkpoints: {len(checkpoints)} given for {len(args.targets)} targets; '
            'give one per target'
        )
    choice = Choice(
        args.keep_ratios, args.scopes, args.part, args.timm, not args.no_host, args.cfg_options
    )
    choice.check()
    targets = [
        load_target(spec, choice, checkpoint)
        for spec, checkpoint in zip(args.targets, checkpoints, strict=True)
    ]
    names = [target.name for target in targets]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f'targets: {", ".join(sorted(twice))} is named twice')
    return [together(targets)] if args.together else targets


def show_case(console: Console, result: Result) -> None:
    """Print one case."""
    title = f'{result.case}, {result.rounds} rounds, against {result.reference}'
    show(console, title, report.case_table(result), left=1)
    for line in report.failures(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def gather(args: argparse.Namespace, console: Console) -> Results:
    """Read and show what was measured before."""
    if args.targets or args.out:
        raise UsageError('--from measures nothing: leave the targets and --out away')
    files = [Results.load(path) for path in args.sources]
    results = Results({'runs': [run for file in files for run in file.about.get('runs', [])]})
    for result in (result for file in files for result in file.results):
        results.results.append(result)
        show_case(console, result)
    return results


def finish(args: argparse.Namespace, console: Console, results: Results) -> None:
    """Print the summary and write what documents need."""
    lines = report.summarize(results.results)
    show(console, 'geometric means over cases', report.summary_table(lines), left=3)
    about = results.described()
    for line in about:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report.markdown(results.results, about), encoding='utf-8')
    if args.plot is not None:
        plot(results.results, args.plot)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parse_args(argv)
    # Where there is no terminal, rich would squeeze the tables into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        results = gather(args, console) if args.sources else run(args, console, argv)
        finish(args, console, results)
    except (ValueError, TypeError, OSError, UsageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 1 if any(result.failed for result in results.results) else 0


if __name__ == '__main__':
    sys.exit(main())
