"""Count the multiply-adds of a model, part by part, for input shapes or over a data set."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table
from torch import nn

from idlevit_mm.analysis.batches import PHASES, data_batches
from idlevit_mm.analysis.flops import (
    DataCount,
    backbone_multiply_adds,
    data_multiply_adds,
    model_multiply_adds,
    pretty,
)
from idlevit_mm.analysis.models import idle_backbone, load_model, parse_shapes, with_keep_ratios
from idlevit_mm.errors import UsageError

Counts = dict[str, dict[str, int]]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path)
    parser.add_argument(
        '--shape',
        nargs='+',
        default=['800x1280'],
        metavar='HxW',
        help='input pixels; several may be given, each for one image',
    )
    parser.add_argument(
        '--data',
        nargs='?',
        const='val',
        choices=PHASES,
        help='average over the images of this data loader of the config (val if none is named) '
        'instead',
    )
    parser.add_argument(
        '--num-images',
        type=int,
        default=100,
        help='with --data: stop after the batch that holds this many images',
    )
    parser.add_argument('--checkpoint', type=Path, help='weights (default: random)')
    parser.add_argument(
        '--keep-ratios',
        nargs='+',
        type=float,
        help='count for each of these, the same in every block (default: as in the config)',
    )
    parser.add_argument('--backbone-only', action='store_true', help='no neck, no heads')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--out', type=Path, help='write the counts to this JSON file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides')
    return parser.parse_args()


def variants_of(model: nn.Module, args: argparse.Namespace) -> dict[str, nn.Module]:
    """What is counted, by the name of its column."""
    if not args.keep_ratios:
        return {'as configured': model}
    return {f'keep {r:g}': with_keep_ratios(model, r) for r in args.keep_ratios}


def count_shape(model: nn.Module, shape: tuple[int, int], backbone_only: bool) -> dict[str, int]:
    """Multiply-adds of each part for one image of this shape."""
    if backbone_only or not hasattr(model, 'backbone'):
        return {'backbone': backbone_multiply_adds(getattr(model, 'backbone', model), shape)}
    return model_multiply_adds(model, shape)


def shape_table(title: str, counts: Counts) -> Table:
    """One column per variant, one row per part."""
    table = Table(title=title)
    table.add_column('part')
    for name in counts:
        table.add_column(name, justify='right')
    for part in next(iter(counts.values())):
        table.add_row(part, *(pretty(count.get(part, 0)) for count in counts.values()))
    return table


def data_table(title: str, counts: Mapping[str, DataCount]) -> Table:
    """One column per variant; means of all parts, extremes of the total, share of tokens."""
    table = Table(title=title)
    table.add_column('per image')
    for name in counts:
        table.add_column(name, justify='right')
    for part in next(iter(counts.values())).parts:
        table.add_row(
            f'{part}, mean', *(pretty(count.parts.get(part, 0)) for count in counts.values())
        )
    table.add_row('total, minimum', *(pretty(count.low) for count in counts.values()))
    table.add_row('total, maximum', *(pretty(count.high) for count in counts.values()))
    shares = [count.share_active for count in counts.values()]
    table.add_row('active tokens', *('–' if s is None else f'{100 * s:.1f} %' for s in shares))
    return table


def main() -> int:
    """Count and print."""
    args = parse_args()
    try:
        shapes = parse_shapes(args.shape)
        model = load_model(args.config, args.checkpoint, args.device, args.cfg_options)
        variants = variants_of(model, args)
        tables: list[Table] = []
        record: dict[str, Any] = {}
        if args.data:
            over_data = {
                name: data_multiply_adds(
                    variant,
                    data_batches(model.cfg, args.data, args.num_images),
                    training=args.data == 'train',
                    backbone_only=args.backbone_only,
                )
                for name, variant in variants.items()
            }
            images = next(iter(over_data.values())).images
            title = f'Multiply-adds, {images} images of {args.data} ({args.config.stem})'
            tables.append(data_table(title, over_data))
            record = {name: asdict(count) for name, count in over_data.items()}
        else:
            for height, width in shapes:
                counts = {
                    name: count_shape(variant, (height, width), args.backbone_only)
                    for name, variant in variants.items()
                }
                title = f'Multiply-adds at {height}×{width} ({args.config.stem})'
                tables.append(shape_table(title, counts))
                record[f'{height}x{width}'] = counts
        backbone = getattr(model, 'backbone', model)
        ratios = None
        if not args.keep_ratios and hasattr(backbone, 'set_keep_ratios'):
            ratios = idle_backbone(model).keep_ratios
    except (ValueError, TypeError, FileNotFoundError, UsageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2

    console = Console()
    for table in tables:
        console.print(table)
    if ratios is not None:
        rounded = [[round(ratio, 4) for ratio in stage] for stage in ratios]
        console.print(f'keep ratios per stage and block: {rounded}', highlight=False)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
