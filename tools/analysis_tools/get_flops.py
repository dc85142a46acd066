"""Count the multiply-adds of a model, part by part, for one input shape."""

import argparse
import json
import sys
from pathlib import Path

from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table

from idlevit_mm.analysis.flops import backbone_multiply_adds, model_multiply_adds, pretty
from idlevit_mm.analysis.models import idle_backbone, load_model, with_keep_ratios
from idlevit_mm.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path)
    parser.add_argument(
        '--shape', nargs=2, type=int, default=[800, 1280], metavar=('H', 'W'), help='input pixels'
    )
    parser.add_argument(
        '--keep-ratios',
        nargs='+',
        type=float,
        help='count for each of these, the same in every block (default: as in the config)',
    )
    parser.add_argument('--backbone-only', action='store_true', help='no neck, no heads')
    parser.add_argument('--out', type=Path, help='write the counts to this JSON file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides')
    return parser.parse_args()


def main() -> int:
    """Print one column per keep ratio, one row per part."""
    args = parse_args()
    try:
        model = load_model(args.config, cfg_options=args.cfg_options)
        variants = {'as configured': model}
        if args.keep_ratios:
            variants = {f'keep {r:g}': with_keep_ratios(model, r) for r in args.keep_ratios}
        counts = {}
        for name, variant in variants.items():
            if args.backbone_only:
                backbone = getattr(variant, 'backbone', variant)
                counts[name] = {'backbone': backbone_multiply_adds(backbone, args.shape)}
            else:
                counts[name] = model_multiply_adds(variant, args.shape)
        ratios = idle_backbone(model).keep_ratios if not args.keep_ratios else None
    except (ValueError, TypeError, FileNotFoundError, UsageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2

    height, width = args.shape
    table = Table(title=f'Multiply-adds at {height}×{width} ({args.config.stem})')
    table.add_column('part')
    for name in counts:
        table.add_column(name, justify='right')
    for part in next(iter(counts.values())):
        table.add_row(part, *(pretty(count.get(part, 0)) for count in counts.values()))
    console = Console()
    console.print(table)
    if ratios is not None:
        rounded = [[round(ratio, 4) for ratio in stage] for stage in ratios]
        console.print(f'keep ratios per stage and block: {rounded}', highlight=False)
    if args.out is not None:
        args.out.write_text(json.dumps(counts, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
