"""Measure how fast a device is at what blocks are made of, and how well that predicts them.

Blocks of several backbones are timed at several sizes and keep ratios, and the pace is fitted that
explains their times best. ``idle_where='pays'`` decides by such a pace: what this prints of a new
kind of device has its place in ``idlevit_mm/kernels/pace.py``.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measures import keep_freed_memory, machine, moment, seconds_between, started, versions
from mmengine.registry import MODELS
from presets import PRESETS
from scipy.optimize import nnls
from tables import spent

from idlevit_mm.analysis.models import noise_image, parse_shapes
from idlevit_mm.analysis.results import exit_code
from idlevit_mm.blocks import Work, idle_work, seconds
from idlevit_mm.kernels import Pace, pace_of


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--models', nargs='+', default=['swin-t', 'pvt-s', 'pvtv2-b2'], choices=PRESETS)
    add('--shapes', nargs='+', default=['224x224', '512x512'], metavar='HxW')
    add('--keep-ratios', nargs='+', type=float, default=[1.0, 0.7, 0.5])
    add('--rounds', type=int, default=5)
    add('--threads', type=int, help='computing threads of the CPU')
    add('--device', default='cpu')
    add('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    add('--out', type=Path, help='write the blocks and the pace to this JSON file')
    return parser.parse_args()


@torch.no_grad()
def measured(args: argparse.Namespace, device: torch.device) -> pd.DataFrame:
    """One row per block, size and keep ratio: its work, and the median of its seconds."""
    rows, dtype = [], getattr(torch, args.dtype)
    for name in args.models:
        model = MODELS.build(PRESETS[name]).eval().to(device, dtype)
        blocks = [block for stage in model.idle_blocks for block in stage]
        for shape in parse_shapes(args.shapes):
            image = noise_image(shape, device).to(dtype)
            for keep in args.keep_ratios:
                model.set_keep_ratios(keep)
                units = [[block] for block in blocks]
                times = [
                    spent(partial(model, image), units, moment, seconds_between)[:-1]
                    for _ in range(args.rounds + 1)
                ]
                maps = [record.hw_shape for record in model.records for _ in record.plans]
                own = np.median(times[1:], axis=0)
                for block, hw_shape, second in zip(blocks, maps, own, strict=True):
                    about = dict(model=name, shape=f'{shape[0]}x{shape[1]}', keep=keep)
                    work = idle_work(block, 1, hw_shape, keep)._asdict()
                    rows.append(dict(about, **work, seconds=second))
    return pd.DataFrame(rows)


def fitted(blocks: pd.DataFrame, known: Pace, dtype: torch.dtype) -> Pace:
    """The pace with which the sum of squared relative errors is least.

    Of linear layers in another precision nothing is measured, and what is known stays.
    """
    work = blocks[list(Work._fields)] * [1, 1, dtype.itemsize, 1, 1]
    # Of numbers alike, and so small that what costs nothing is no division by zero.
    scale = work.max().clip(lower=1)
    costs, _ = nnls((work / scale).div(blocks.seconds, axis=0).to_numpy(), np.ones(len(work)))
    *rates, launch, choice = costs.clip(min=1e-12) / scale
    product, pair, byte = (round(1 / rate) for rate in rates)
    own = known._replace(pairs=pair, moved=byte, launch=round(1e9 * launch))
    own = own._replace(choice=round(1e9 * choice))
    return own._replace(**{'half' if dtype.itemsize == 2 else 'single': product})


def errors_of(blocks: pd.DataFrame, pace: Pace, dtype: torch.dtype) -> pd.Series:
    """Predicted over measured time of each block, less 1."""
    rows = blocks[list(Work._fields)].itertuples(index=False)
    return [seconds(Work(*row), pace, dtype) for row in rows] / blocks.seconds - 1


@exit_code
def main() -> None:
    """Measure, fit and print."""
    args = parse_args()
    device, dtype = started(args.device, args.threads), getattr(torch, args.dtype)
    keep_freed_memory()
    blocks = measured(args, device)
    known = pace_of(device)
    paces = dict(known=known, measured=fitted(blocks, known, dtype))
    table = pd.DataFrame.from_dict(paces, 'index', columns=Pace._fields).T
    for name, share in (('half of the errors within', 0.5), ('nine of ten', 0.9)):
        errors = (errors_of(blocks, pace, dtype).abs().quantile(share) for pace in paces.values())
        table.loc[name] = [f'{error:.1%}' for error in errors]
    print(f'{len(blocks)} blocks, {args.dtype}, {torch.get_num_threads()} threads, {args.device}')
    print(table.to_markdown(disable_numparse=True))
    print(f'{machine()}; {versions()}')
    if args.out is not None:
        about = dict(vars(args), out=None, pace=paces['measured']._asdict(), machine=machine())
        about |= dict(versions=versions(), blocks=blocks.to_dict('records'))
        args.out.write_text(json.dumps(about, indent=2) + '\n')


if __name__ == '__main__':
    sys.exit(main())
