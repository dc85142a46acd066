"""Count the multiply-adds of a model, part by part, for input shapes or over a data set."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mmengine.config import Config
from mmengine.runner import Runner, set_random_seed
from torch import nn

from idlevit_mm.analysis import flops
from idlevit_mm.analysis.models import load_model, parse_shapes, scheduled, with_keep_ratios
from idlevit_mm.analysis.results import exit_code
from idlevit_mm.engine.checks import check_datasets
from idlevit_mm.engine.options import Overrides
from idlevit_mm.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', type=Path)
    add('--shape', nargs='+', default=['800x1280'], metavar='HxW', help='input pixels, or several')
    phases = ('val', 'test', 'train')
    add('--data', nargs='?', const='val', choices=phases, help='average over images of this loader')
    add('--num-images', type=int, default=100, help='with --data: as many at least')
    add('--checkpoint', type=Path, help='weights (default: random)')
    add('--keep-ratios', nargs='+', type=float, help='each, the same in all blocks')
    add('--schedule', action='store_true', help="ratios are of the config's schedule by name")
    add('--backbone-only', action='store_true', help='no neck, no heads')
    add('--device', default='cpu')
    add('--out', type=Path, help='write the counts to this JSON file')
    add('--cfg-options', nargs='+', action=Overrides, help='overrides')
    return parser.parse_args()


def data_batches(cfg: Config, phase: str, num_images: int | None) -> Iterator[dict[str, Any]]:
    """Batches of one of a config's data loaders, in this process, as the runner would get them.

    What the loader of 'val', 'test' or 'train' yields, before the model's data preprocessor: of one
    epoch, or of so many images at least as ``num_images`` says.

    Raises:
        UsageError: The config has no such loader, or its data are not there.
        ValueError: ``num_images`` is below 1.
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f'num_images={num_images} must be at least 1')
    key = f'{phase}_dataloader'
    if not isinstance(cfg.get(key), dict):
        raise UsageError(f'the config has no {key}')
    # What the evaluator reads is not needed here.
    check_datasets({key: cfg[key]}, (phase,))
    settings = {**cfg[key], 'num_workers': 0, 'persistent_workers': False}
    settings.pop('prefetch_factor', None)
    set_random_seed(0)
    loader = Runner.build_dataloader(settings, seed=0)
    # Samplers of iteration based training never end.
    length: int = len(loader.dataset)
    wanted = length if num_images is None else min(num_images, length)
    return islice(loader, -(-wanted // loader.batch_sampler.batch_size))


def count_data(
    model: nn.Module, batches: Iterable[dict[str, Any]], training: bool, backbone_only: bool
) -> dict[str, Any]:
    """Mean multiply-adds per image of a model's parts on real data, and what they range over.

    In eval mode, without post-processing, on what its data loader yields. 'low' and 'high' are
    totals of an image (of a batch, divided by its images); 'share_active' is the mean share of
    active tokens, all blocks counted alike, and None for a backbone without idle tokens.

    Raises:
        ValueError: There is no batch.
    """
    rows, images, shares = [], [], []
    backbone = getattr(model, 'backbone', model)
    with flops.evaluating(model):
        for batch in batches:
            data = model.data_preprocessor(batch, training)
            inputs = data['inputs']
            if backbone_only:
                count = flops.count_multiply_adds(backbone, inputs)
                counts = {'backbone': count, flops.TOTAL: count}
            else:
                samples = data.get('data_samples')
                counts = flops.part_multiply_adds(model, inputs, samples, mode='tensor')
            images.append(len(inputs))
            rows.append({part: count / len(inputs) for part, count in counts.items()})
            if hasattr(backbone, 'set_keep_ratios'):
                masks = chain(*backbone.keep_masks)
                shares.append(np.mean([mask.float().mean().item() for mask in masks]))
    if not images:
        raise ValueError('batches hold no image to count')
    table = pd.DataFrame(rows).fillna(0.0)
    table[flops.TOTAL] = table.pop(flops.TOTAL)  # parts that not every batch uses come before it
    return {
        'images': sum(images),
        'parts': table.apply(np.average, weights=images).to_dict(),
        'low': table[flops.TOTAL].min(),
        'high': table[flops.TOTAL].max(),
        'share_active': np.average(shares, weights=images) if shares else None,
    }


@exit_code
def main() -> None:
    """Count and print."""
    args = parse_args()
    record: dict[str, dict[str, Any]] = {}
    tables: dict[str, dict[str, dict[str, str]]] = {}
    shapes = parse_shapes(args.shape)
    model = load_model(args.config, args.checkpoint, args.device, args.cfg_options)
    backbone, ratios = model.cfg.model.get('backbone', model.cfg.model), args.keep_ratios or ()
    kept = {r: scheduled(backbone, r) if args.schedule else r for r in ratios}
    variants = {f'keep {r:g}': with_keep_ratios(model, ratio) for r, ratio in kept.items()}
    for name, variant in (variants or {'as configured': model}).items():
        if args.data:
            batches = data_batches(model.cfg, args.data, args.num_images)
            found = count_data(variant, batches, args.data == 'train', args.backbone_only)
            record[name] = found
            means = {f'{part}, mean': mean for part, mean in found['parts'].items()}
            means |= {'total, minimum': found['low'], 'total, maximum': found['high']}
            column = {title: flops.pretty(count) for title, count in means.items()}
            share = found['share_active']
            column['active tokens'] = '–' if share is None else f'{share:.1%}'
            title = f'Multiply-adds, {found["images"]} images of {args.data}'
            tables.setdefault(title, {})[name] = column
        for height, width in () if args.data else shapes:
            counts = flops.model_multiply_adds(variant, (height, width), args.backbone_only)
            record.setdefault(f'{height}x{width}', {})[name] = counts
            column = {part: flops.pretty(count) for part, count in counts.items()}
            tables.setdefault(f'Multiply-adds at {height}×{width}', {})[name] = column
    for title, columns in tables.items():
        align = ['left', *['right'] * len(columns)]
        print(f'{title} ({args.config.stem})')
        print(pd.DataFrame(columns).fillna('0').to_markdown(disable_numparse=True, colalign=align))
    ratios = getattr(getattr(model, 'backbone', model), 'keep_ratios', None)
    if ratios is not None and not args.keep_ratios:
        print('keep ratios per stage and block:', [[float(f'{r:.4g}') for r in s] for s in ratios])
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    sys.exit(main())
