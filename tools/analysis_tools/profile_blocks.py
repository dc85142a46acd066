"""Time the parts of idle blocks: what scoring, selecting, gathering and scattering cost.

All of it is in relation to the time of the blocks of each stage, and of all blocks.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import nn

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.models import idle_backbone, load_model, noise_image, parse_shapes
from idlevit_mm.analysis.profile import (
    BLOCK_PARTS,
    MODES,
    BlockProfile,
    idling_share,
    profile_blocks,
)
from idlevit_mm.analysis.runs import machine, versions
from idlevit_mm.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'target', help='a config, or the registered name of an idle backbone for its defaults'
    )
    parser.add_argument(
        '--keep-ratios',
        nargs='+',
        type=float,
        help='one for all blocks, or one per stage (default: as configured)',
    )
    parser.add_argument('--shape', nargs='+', default=['512x512'], metavar='HxW')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--mode', choices=MODES, default='inference')
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--threads', type=int, help='computing threads')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--out', type=Path, help='write the figures to this JSON file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides')
    return parser.parse_args()


def build_target(target: str, cfg_options: dict | None, device: str) -> nn.Module:
    """The model of a config, or a backbone by its registered name."""
    if target in MODELS.module_dict:
        return MODELS.build(dict(type=target, **(cfg_options or {}))).to(device)
    if not Path(target).is_file():
        raise UsageError(
            f'target {target!r} is neither a config file nor a registered name such as '
            'IdleSwinTransformer'
        )
    return load_model(target, device=device, cfg_options=cfg_options)


def table_of(profile: BlockProfile, title: str) -> Table:
    """One row per part, one column per stage and one for all blocks: milliseconds and share."""
    table = Table(title=title)
    table.add_column('ms (share of the blocks)')
    for stage in range(len(profile.stages)):
        table.add_column(f'stage {stage + 1}', justify='right')
    table.add_column('all blocks', justify='right')
    columns = [*profile.stages, profile.blocks]
    sums = [sum(column.values()) or 1.0 for column in columns]

    def cell(seconds: float, whole: float) -> str:
        return f'{1000 * seconds:.2f} ({100 * seconds / whole:4.1f} %)'

    for part in BLOCK_PARTS:
        if profile.blocks[part]:
            cells = (cell(column[part], whole) for column, whole in zip(columns, sums, strict=True))
            table.add_row(part, *cells)
    table.add_section()
    table.add_row('sum', *(f'{1000 * whole:.2f}         ' for whole in sums))
    table.add_row(
        'scoring, selecting, gathering, scattering',
        *(f'{100 * idling_share(column):.1f} %' for column in columns),
    )
    return table


def main() -> int:
    """Profile and print."""
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        shapes = parse_shapes(args.shape)
        model = build_target(args.target, args.cfg_options, args.device)
        if args.keep_ratios:
            ratios = args.keep_ratios
            idle_backbone(model).set_keep_ratios(ratios[0] if len(ratios) == 1 else ratios)
        profiles = {
            shape: profile_blocks(
                model,
                noise_image((args.batch, 3, *shape), args.device),
                mode=args.mode,
                rounds=args.rounds,
                warmup=args.warmup,
            )
            for shape in shapes
        }
    except (ValueError, TypeError, FileNotFoundError, UsageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2

    # Where there is no terminal, rich would squeeze the table into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    threads = f'{torch.get_num_threads()} threads' if args.device == 'cpu' else args.device
    name = Path(args.target).stem
    for (height, width), profile in profiles.items():
        title = f'{name}, {args.batch}×3×{height}×{width}, {args.mode}, {threads}'
        console.print(table_of(profile, title))
        console.print(f'outside the blocks: {1000 * profile.outside:.2f} ms', highlight=False)
        if profile.backward is not None:
            console.print(f'backward pass: {1000 * profile.backward:.2f} ms', highlight=False)
    console.print(f'{machine()}; {versions()}', highlight=False)
    if args.out is not None:
        record = {
            'target': args.target,
            'batch': args.batch,
            'mode': args.mode,
            'keep_ratios': idle_backbone(model).keep_ratios,
            'rounds': args.rounds,
            'threads': torch.get_num_threads(),
            'device': args.device,
            'machine': machine(),
            'versions': versions(),
            'profiles': {f'{h}x{w}': profile.as_dict() for (h, w), profile in profiles.items()},
        }
        args.out.write_text(json.dumps(record, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
