"""Export a backbone or a whole model to ONNX, OpenVINO or torch.export, and check the graph.

The graph is compared with eager PyTorch, its outputs and which tokens it keeps, in two batches.
docs/export.md tells what is verified, the limits, and where idling pays in other runtimes.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mmengine.config import Config
from torch import nn

from idlevit_mm.analysis import export
from idlevit_mm.analysis.models import (
    idle_backbone,
    load_config,
    load_model,
    noise_image,
    parse_shapes,
    with_keep_ratios,
)
from idlevit_mm.analysis.results import exit_code
from idlevit_mm.engine.options import Overrides
from idlevit_mm.errors import UsageError, one_line

# What tools of analysis share.
sys.path.append(str(Path(sys.path[0], 'analysis_tools')))
import measures
from presets import PRESETS

Size = tuple[int, int]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help=f'a config file, or a preset: {", ".join(PRESETS)}')
    add('checkpoint', nargs='?', help='default: random weights')
    add('out', type=Path, help='file to write: .onnx, .pt2 (torch.export) or .xml (OpenVINO)')
    add('--part', default='backbone', choices=('backbone', 'model'), help='model: tensor mode')
    add('--shape', nargs='+', default=['512x512'], metavar='HxW', help='a file for each')
    add('--batch', type=int, default=1, help='images of a batch')
    add('--dynamic-batch', action='store_true', help='any number of images')
    add('--keep-ratios', nargs='+', type=float, help='one, or one per stage (default: the config)')
    check_help = 'compare outputs and kept tokens with eager PyTorch (default: yes)'
    add('--verify', action=argparse.BooleanOptionalAction, default=True, help=check_help)
    add('--images', nargs='+', default=[], help='image files to compare on, beside noise')
    add('--time', action='store_true', help='against eager and the exported dense model, in turns')
    add('--rounds', type=int, default=20, help='of timing')
    add('--threads', type=int, help='computing threads')
    add('--cfg-options', nargs='+', action=Overrides, help='overrides, model.… of presets')
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Config, nn.Module]:
    """The config, and the model or its backbone, with the ratios asked for."""
    spec: Any = Config(dict(model=PRESETS[args.config])) if args.config in PRESETS else args.config
    cfg = load_config(spec, args.cfg_options)
    if cfg.get('model') is None:
        raise UsageError(f'{args.config} has no model')
    if args.part == 'model' and 'backbone' not in cfg.model:
        raise UsageError(f'{args.config} is a bare backbone: no --part model')
    try:
        model = load_model(cfg, args.checkpoint)
    except (ImportError, KeyError) as error:  # KeyError: no installed library has the class
        raise UsageError(f'{args.config} cannot be built: {one_line(error)}') from error
    model = model if args.part == 'model' else getattr(model, 'backbone', model)
    if args.keep_ratios:
        ratios = args.keep_ratios
        model = with_keep_ratios(model, ratios[0] if len(ratios) == 1 else ratios)
    return cfg, model.requires_grad_(False)


def write(model: nn.Module, shape: Size, path: Path, args: Any, with_masks: bool = False) -> Any:
    """Record a graph for images of a size, write it, and return it."""
    graph = export.Graph(export.fixed(model, shape), with_masks)
    images = noise_image(shape, model=model, batch=args.batch)
    program = export.record_graph(graph, images, args.dynamic_batch)
    export.save_graph(program, path)
    return program


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table of Markdown."""
    print('', pd.DataFrame(rows).to_markdown(index=False), '', sep='\n', flush=True)


def verify(cfg: Config, model: nn.Module, shape: Size, path: Path, args: Any) -> bool:
    """Print how the graph differs from eager PyTorch; whether it is right."""
    sizes = (1, 3) if args.dynamic_batch else (args.batch, args.batch + 1)
    batches = {f'noise, {size}': noise_image(shape, model=model, batch=size) for size in sizes}
    if args.images:
        files = export.file_images(args.images, shape, cfg)
        for size in sizes:
            batches[f'files, {size}'] = files[torch.arange(size) % len(files)]
    graph = export.Graph(model, with_masks=True)
    with torch.no_grad():
        graph(next(iter(batches.values())))
    idles = bool(graph.masks())
    rows, right = [], True
    with tempfile.TemporaryDirectory() as folder:
        masked = Path(folder, path.name)
        if idles:
            write(model, shape, masked, args, with_masks=True)
        with_masks = export.runtimes(masked) if idles else {}
        for runtime, run in export.runtimes(path).items():
            found = export.compare_graphs(graph, run, with_masks.get(runtime), batches)
            rows += [line_of(runtime, row) for row in found if not row.refused]
            for size, reason in {row.batch: row.refused for row in found if row.refused}.items():
                print(f'{runtime} refuses a batch of {size}: {reason}')
                # What was exported for must run.
                right &= size == args.batch + 1 and not args.dynamic_batch
            right &= all(row.is_right for row in found)
    print_table(rows)
    return right


def line_of(runtime: str, row: export.Row) -> dict[str, Any]:
    """A row for print_table."""
    return {
        'runtime': runtime,
        'images, batch': row.images,
        'largest difference': f'{row.largest:.1e}',
        'typical': f'{row.typical:.1e}',
        'tokens kept otherwise': '-' if row.others is None else f'{row.others:.3%}',
        '': 'right' if row.is_right else 'WRONG',
    }


def time_all(model: nn.Module, shape: Size, path: Path, args: Any) -> None:
    """Print seconds of eager PyTorch and of the runtimes, at the keep ratios and all kept."""
    images = noise_image(shape, model=model, batch=args.batch)
    dense = with_keep_ratios(model, 1.0)
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dense_path = Path(folder, path.name)
        write(dense, shape, dense_path, args)
        for kind, own, file in (('dense', dense, dense_path), ('idle', model, path)):
            calls[f'eager {kind}'] = partial(own, images)
            for runtime, run in export.runtimes(file).items():
                calls[f'{runtime} {kind}'] = partial(run, images)
        seconds = measures.compare(calls, args.rounds)
    rows = []
    for name in dict.fromkeys(name.rpartition(' ')[0] for name in calls):
        idle, all_kept = seconds[f'{name} idle'], seconds[f'{name} dense']
        rows.append(
            {
                'runtime': name,
                'dense, ms': f'{1e3 * measures.spread(all_kept)[0]:.0f}',
                'idle, ms': f'{1e3 * measures.spread(idle)[0]:.0f}',
                'dense / idle': f'{measures.spread(all_kept, idle)[0]:.2f}',
                'eager idle / idle': f'{measures.spread(seconds["eager idle"], idle)[0]:.2f}',
            }
        )
    print_table(rows)


@exit_code
def main() -> int:
    """Do what the command line asks for; 1 where a graph is wrong."""
    args = parse_args()
    export.check_target(args.out)
    shapes = parse_shapes(args.shape)
    if min(args.batch, args.rounds, args.threads or 1) < 1:
        raise UsageError('--batch, --rounds and --threads must be at least 1')
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg, model = load(args)
    right = True
    for shape in shapes:
        size = f'{shape[0]}x{shape[1]}'
        path = args.out if len(shapes) == 1 else args.out.with_stem(f'{args.out.stem}_{size}')
        program = write(model, shape, path, args)
        batch = 'any batch' if args.dynamic_batch else f'batch {args.batch}'
        print(f'{path}: {export.TARGETS[path.suffix][0]}, {size}, {batch}')
        print(export.tensorrt_note(program, idle_backbone(model)))
        if args.verify:
            right &= verify(cfg, model, shape, path, args)
        if args.time:
            print(f'{measures.machine()}; {torch.get_num_threads()} threads; {measures.versions()}')
            time_all(model, shape, path, args)
    if not right:
        print('error: the graph does something else than PyTorch, see above', file=sys.stderr)
    return 0 if right else 1


if __name__ == '__main__':
    sys.exit(main())
