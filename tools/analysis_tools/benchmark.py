"""Time several configs or keep ratios in turns, in one process, against the dense backbone.

The dense backbone is mmdet's own class, or mmseg's for a plain ViT.
Every candidate is timed once per round and ratios are formed within rounds, so that a slow spell
of the machine hits all of them. The realised share tells how much of the saved multiply-adds is
saved time: 1 means all of it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table

from idlevit_mm.analysis.benchmark import PARTS, benchmark, noise_image, table_cells
from idlevit_mm.analysis.models import load_model, with_host_backbone, with_keep_ratios
from idlevit_mm.analysis.runs import machine, versions
from idlevit_mm.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument(
        '--checkpoints',
        nargs='+',
        type=Path,
        help='one per config (default: random weights, with which timing a whole detector says '
        'little, because its boxes are noise)',
    )
    parser.add_argument(
        '--keep-ratios', nargs='+', type=float, help='each config with each of these ratios'
    )
    parser.add_argument('--part', choices=PARTS, default='backbone')
    parser.add_argument(
        '--no-host', action='store_true', help='leave the dense class of mmdet or mmseg out'
    )
    parser.add_argument('--shape', nargs=2, type=int, default=[800, 1280], metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--threads', type=int, help='computing threads')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='write the figures to this JSON file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides')
    return parser.parse_args()


def collect(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """All candidates by name; of the first config the dense class comes first."""
    checkpoints = args.checkpoints or [None] * len(args.configs)
    if len(checkpoints) != len(args.configs):
        raise ValueError(
            f'--checkpoints: {len(checkpoints)} given for {len(args.configs)} configs; '
            'give one per config'
        )
    models = {}
    for config, checkpoint in zip(args.configs, checkpoints, strict=True):
        model = load_model(config, checkpoint, args.device, args.cfg_options)
        prefix = f'{config.stem} ' if len(args.configs) > 1 else ''
        if not args.no_host:
            dense = with_host_backbone(model)
            host = type(dense.backbone).__module__.split('.')[0]
            models[f"{prefix}{host}'s dense"] = dense
        if args.keep_ratios:
            for ratio in args.keep_ratios:
                models[f'{prefix}keep {ratio:g}'] = with_keep_ratios(model, ratio)
        else:
            models[f'{prefix}as configured'] = model
    return models


def main() -> int:
    """Time and print."""
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        models = collect(args)
        rows, _ = benchmark(
            models,
            noise_image((args.batch, 3, *args.shape), args.device),
            args.part,
            rounds=args.rounds,
            warmup=args.warmup,
        )
    except (ValueError, TypeError, FileNotFoundError, UsageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    header, cells = table_cells(rows)
    height, width = args.shape
    threads = f'{torch.get_num_threads()} threads' if args.device == 'cpu' else args.device
    table = Table(
        title=f'{args.part}, {args.batch}×3×{height}×{width}, float32, {threads}, '
        f'{args.rounds} rounds'
    )
    for index, name in enumerate(header):
        table.add_column(name, justify='right' if index else 'left')
    for line in cells:
        table.add_row(*line)
    # Where there is no terminal, rich would squeeze the table into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    console.print(f'{machine()}; {versions()}', highlight=False)
    if args.out is not None:
        record = {
            'part': args.part,
            'shape': [args.batch, 3, height, width],
            'rounds': args.rounds,
            'threads': torch.get_num_threads(),
            'device': args.device,
            'machine': machine(),
            'versions': versions(),
            'rows': [row.as_dict() for row in rows],
        }
        args.out.write_text(json.dumps(record, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
