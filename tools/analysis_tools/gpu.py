"""Check the kernels of a GPU against float32, count what they move, and time them, all at once.

Every result is a line in a file at once; the same command goes on where the last one stopped, and
tries again what failed. docs/benchmark.md explains the figures.
"""

import argparse
import functools
import gc
import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_report as report
import measures
import parity
import torch
from mmengine.config import Config
from presets import PRESETS
from torch import Tensor
from traffic import Traffic, launches

from idlevit_mm import __version__
from idlevit_mm.analysis import models
from idlevit_mm.analysis.results import Line, add_line, exit_code
from idlevit_mm.errors import UsageError, one_line, reason
from idlevit_mm.kernels import backend_at

MODES = 'eager', 'captured', 'compiled'
# Of timing, per case.
_MAX_SECONDS = 6.0
OWN = 'keep 1'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--device', default='cuda', help='cpu tries everything out but the kernels')
    add('--out-dir', type=Path, default=Path('work_dirs/gpu'))
    add('--models', nargs='*', default=['swin-t', 'pvt-s', 'pvtv2-b2'], choices=PRESETS)
    add('--shapes', nargs='+', default=['800x1344', '512x512'], metavar='HxW')
    add('--batches', nargs='+', type=int, default=[2, 1], help='of each shape')
    add('--modes', nargs='+', default=MODES, choices=MODES)
    add('--rounds', type=int, default=30, help='how often each candidate is timed')
    parity_models = ['swin-t', 'pvt-t', 'pvtv2-b1', 'mit-b1']
    add('--parity-models', nargs='*', default=parity_models, choices=PRESETS)
    add('--parity-shapes', nargs='+', default=['411x517'], metavar='HxW', help='odd ones')
    add('--max-minutes', type=float, default=8.0, help='start no case that would end later')
    args = parser.parse_args(argv)
    if len(args.shapes) != len(args.batches):
        parser.error(f'{len(args.batches)} --batches for {len(args.shapes)} --shapes')
    return args


def cases_of(args: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """What is to be measured, most important first."""
    place = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    for model in args.parity_models:
        for shape in models.parse_shapes(args.parity_shapes):
            for dtype, keep in itertools.product(('fp16', 'bf16'), (1.0, 0.5, 0.3)):
                yield report.case('parity', model, place, (2, *shape), dtype, keep=keep)
            for dtype in ('fp16', 'bf16'):
                yield report.case('gradients', model, place, (2, *shape), dtype, keep=0.5)
    sizes = list(zip(args.batches, models.parse_shapes(args.shapes), strict=True))
    for model in args.models:
        for keep in (1.0, 0.5):
            yield report.case('traffic', model, place, (sizes[0][0], *sizes[0][1]), keep=keep)
    for mode in args.modes:
        for batch, shape in sizes if mode != 'captured' or device.type == 'cuda' else ():
            for model in args.models:
                yield report.case('times', model, place, (batch, *shape), mode=mode)


def prepared(case: Line, device: torch.device) -> tuple[Any, Tensor]:
    """Backbone and images (B, 3, H, W) of a case, in its precision: autocast fuses less."""
    batch, *shape = case['images']
    dtype = models.DTYPES[case['dtype']]
    model = models.load_model(Config(dict(model=PRESETS[case['model']])), device=device).to(dtype)
    if case['keep'] is not None:
        model.set_keep_ratios(case['keep'])
    return model, models.noise_image((batch, 3, *shape), device).to(dtype)


def check_parity(case: Line, device: torch.device, _: argparse.Namespace) -> None:
    """Outputs or gradients, and chosen tokens, by the backend taken and PyTorch's, to float32's."""
    half, images = prepared(case, device)
    parity.randomize(half)
    interpreted = device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') == '1'
    backend = 'triton' if interpreted else None
    training = case['what'] == 'gradients'
    found, wrong = parity.against_float32(half, images, backend, training)
    if device.type == 'cuda' and found['backend'] != 'triton':
        wrong.append(f'Triton is not taken: {found["why_not"]}')
    case |= dict(found, error='; '.join(wrong) or None)


def count_traffic(case: Line, device: torch.device, _: argparse.Namespace) -> None:
    """Bytes by operation, and what the profiler saw the GPU run, by kernel too."""
    model, images = prepared(case, device)
    # Tables are made in the first pass.
    model(images)
    with Traffic() as counted:
        model(images)
    seen = launches(functools.partial(model, images)) if device.type == 'cuda' else {}
    taken = {name: [len(seconds), 1000 * sum(seconds)] for name, seconds in seen.items()}
    number, busy = map(sum, zip(*taken.values(), strict=True)) if taken else (None, None)
    case |= dict(backend=backend_at(images).name, bytes=counted.bytes.total())
    case |= dict(operations=counted.operations.total(), kernels=counted.kernels)
    case |= dict(launches=number, busy_ms=busy, by_kernel=taken, error=None)


def time_all(case: Line, device: torch.device, args: argparse.Namespace) -> None:
    """Keep ratios and the dense class of mmdet, in turns."""
    model, images = prepared(case, device)
    candidates = {f'keep {keep:g}': models.with_keep_ratios(model, keep) for keep in report.KEEPS}
    try:
        host = models.host_backbone(model, PRESETS[case['model']])
        candidates[report.HOST] = models.Autocast(host, images.dtype)
    except ValueError as error:
        case['note'] = one_line(error)
    figures: dict[str, dict[str, Any]] = {name: {} for name in candidates}
    makers = {
        name: functools.partial(parity.checked_call, candidate, images, case['mode'])
        for name, candidate in candidates.items()
    }
    compiled = case['mode'] == 'compiled'
    with measures.strictly_compiled() if compiled else nullcontext():
        limits = args.rounds, 3, _MAX_SECONDS
        _, seconds, failed = measures.compare_working(makers, OWN, *limits)
    for name, taken in seconds.items():
        figures[name]['ms'] = measures.spread(taken, case['images'][0] / 1000)
        for key, other in (('own', OWN), ('host', report.HOST)):
            if other in seconds:
                figures[name][key] = measures.spread(seconds[other], taken)
    for name, why in failed.items():
        figures[name]['error'] = why
    case['candidates'] = figures
    wrong = [f'{name}: {own["error"]}' for name, own in figures.items() if 'error' in own]
    case['error'] = '; '.join(wrong) or None


MEASURES = dict(parity=check_parity, gradients=check_parity, traffic=count_traffic, times=time_all)


def run(cases: Sequence[Line], device: torch.device, args: argparse.Namespace, path: Path) -> None:
    """Measure what the file has not, as long as there is time, and add it to the file."""
    begun, known = time.monotonic(), report.failures(path)
    todo = [case for case in cases if known.get(report.key_of(case), '') is not None]
    # What failed before comes last: it may take the device with it.
    todo.sort(key=lambda case: report.key_of(case) in known)
    print(f'{len(cases) - len(todo)} of {len(cases)} cases are in {path}')
    longest: dict[tuple[str, str], float] = {}
    for number, case in enumerate(todo):
        begin, kind = time.monotonic(), (case['what'], case['mode'])
        if begin - begun + longest.get(kind, 0.0) > 60 * args.max_minutes:
            print(f'{len(todo) - number} cases are left: the same command goes on with them')
            break
        try:
            with torch.no_grad():
                MEASURES[case['what']](case, device, args)
        except Exception as error:
            case['error'] = reason(error)
        add_line(case, path)
        now = time.monotonic()
        longest[kind] = max(longest.get(kind, 0.0), now - begin)
        print(f'[{number + 1}/{len(todo)}, {now - begun:.0f} s] {report.told(case)}', flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if case['error'] and device.type == 'cuda':
            # Ends the run where the failure took the device with it.
            torch.cuda.synchronize()


@exit_code
def main(argv: Sequence[str] | None = None) -> bool:
    """Measure, and write tables and a picture; whether anything failed."""
    args = parse_args(argv)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise UsageError('no GPU that torch can use; --device cpu tries out all but the kernels')
    device = measures.started(args.device)
    command = shlex.join(['gpu.py', *(sys.argv[1:] if argv is None else argv)])
    versions = f'idlevit_mm {__version__}, {measures.versions()}'
    path = args.out_dir / 'results.jsonl'
    add_line(dict(machine=measures.machine(), versions=versions, command=command), path)
    cases = list(cases_of(args, device))
    try:
        run(cases, device, args, path)
    finally:
        # Also of a run that was interrupted, or whose device is lost.
        print(report.write(path, args.out_dir))
    failures = report.failures(path)
    return any(failures.get(report.key_of(case)) for case in cases)


if __name__ == '__main__':
    sys.exit(main())
