"""Time whole training iterations of a config in turns: its idle backbone against the dense class.

The iterations are the runner's own, data loading included. Loader processes work ahead while the
other model has its turn: give --workers 0 to see the whole cost of loading.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table

from idlevit_mm.analysis.latency import Spread
from idlevit_mm.analysis.models import load_config
from idlevit_mm.analysis.runs import machine, versions
from idlevit_mm.analysis.training_profile import (
    DENSE,
    IDLE,
    PARTS,
    TrainingProfile,
    profile_training,
    shares,
)
from idlevit_mm.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path)
    parser.add_argument(
        '--keep-ratios',
        nargs='+',
        type=float,
        help='one for all blocks, or one per stage (default: as configured)',
    )
    parser.add_argument('--checkpoint', type=Path, help='weights (default: random)')
    parser.add_argument('--iters', type=int, default=30, help='timed iterations of each')
    parser.add_argument('--warmup', type=int, default=3, help='iterations before these')
    parser.add_argument('--workers', type=int, help='loader processes (default: as configured)')
    parser.add_argument('--threads', type=int, help='computing threads')
    parser.add_argument('--out', type=Path, help='write the figures to this JSON file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides')
    return parser.parse_args()


def table_of(profile: TrainingProfile) -> Table:
    """One row per part, median milliseconds and share of both models, and their ratio."""
    table = Table()
    table.add_column('')
    for name in profile.parts:
        table.add_column(f'{name}, ms', justify='right')
        table.add_column('share', justify='right')
    table.add_column(f'time {IDLE} / {DENSE}', justify='right')
    share = {name: shares(seconds) for name, seconds in profile.parts.items()}
    for part in PARTS:
        medians = {n: Spread.of(seconds[part]).median for n, seconds in profile.parts.items()}
        cells = []
        for name, median in medians.items():
            cells += [f'{1000 * median:.1f}', f'{100 * share[name][part]:.1f} %']
        dense = medians[DENSE]
        table.add_row(part, *cells, f'{medians[IDLE] / dense:.2f}' if dense else '–')
    table.add_section()
    cells = []
    for name in profile.parts:
        cells += [f'{1000 * profile.iterations.time(name).median:.1f}', '']
    ratio = profile.iterations.ratio(IDLE)
    table.add_row('iteration', *cells, f'{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f})')
    return table


def main() -> int:
    """Profile and print."""
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    ratios = args.keep_ratios
    if ratios is not None and len(ratios) == 1:
        ratios = ratios[0]
    try:
        cfg = load_config(args.config, args.cfg_options)
        if args.workers is not None:
            cfg.train_dataloader.num_workers = args.workers
            cfg.train_dataloader.persistent_workers = args.workers > 0
        with tempfile.TemporaryDirectory() as work_dir:
            profile = profile_training(
                cfg,
                work_dir,
                keep_ratios=ratios,
                checkpoint=args.checkpoint,
                iters=args.iters,
                warmup=args.warmup,
            )
    except (ValueError, TypeError, FileNotFoundError, UsageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2

    # Where there is no terminal, rich would squeeze the table into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    keep = 'as configured' if ratios is None else f'keep {ratios}'
    batch, workers = cfg.train_dataloader.batch_size, cfg.train_dataloader.num_workers
    console.print(
        f'{args.config.stem}, {keep}, batch {batch}, {workers} loader processes, '
        f'{torch.get_num_threads()} threads, {args.iters} iterations',
        highlight=False,
    )
    console.print(table_of(profile))
    console.print(f'{machine()}; {versions()}', highlight=False)
    if args.out is not None:
        record = {
            'config': str(args.config),
            'keep_ratios': ratios,
            'threads': torch.get_num_threads(),
            'workers': workers,
            'batch': batch,
            'machine': machine(),
            'versions': versions(),
            'seconds': profile.parts,
            'iterations': dict(profile.iterations.seconds),
        }
        args.out.write_text(json.dumps(record, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
