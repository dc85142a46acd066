"""Time presets, configs and keep ratios in turns, in one process, against the dense backbone.

Every candidate is timed once per round and ratios are formed within rounds, so that a slow spell
of the machine hits all of them. The realised share tells how much of the saved multiply-adds is
saved time: 1 means all of it. docs/benchmark.md explains every option.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_report as report
import measures
import torch
from mmengine.config import Config
from presets import PRESETS, TIMM, timm_twin
from torch import Tensor, nn

from idlevit_mm.analysis import models
from idlevit_mm.analysis.flops import model_multiply_adds
from idlevit_mm.analysis.results import exit_code
from idlevit_mm.engine.options import Overrides
from idlevit_mm.errors import UsageError
from idlevit_mm.losses import shared_copy


class Candidate(NamedTuple):
    """A model to be timed."""

    name: str  # in tables
    # 'host' (of mmdet or mmseg), 'timm', 'dense' (idle class, all kept), 'idle' or 'config'
    kind: str
    build: Callable[[tuple[int, int]], nn.Module]  # in eval mode on the CPU, for (H, W) pixels
    keep: float | None = None  # ratio of all blocks, where there is one


def always(model: nn.Module) -> Callable[[object], nn.Module]:
    """The ``build`` of a candidate whose model fits every size."""
    return lambda _: model


def positive(text: str) -> int:
    """A type for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be at least 1')
    return int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse options that do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, usage='%(prog)s [options] TARGET ...')
    add = parser.add_argument
    add('targets', nargs='*', help=f'config files, or presets: {", ".join(PRESETS)}')
    add('--keep-ratios', nargs='+', type=float, help='each (default: presets 1.0 0.7 0.5)')
    add('--schedule', action='store_true', help="ratios are of the config's schedule by name")
    add('--as-configured', action='store_true', help="a config's own keep ratios beside them")
    add('--against-own', action='store_true', help='the reference is keep 1, not the dense class')
    add('--timm', action='store_true', help="timm's twins of presets take part")
    add('--checkpoints', nargs='+', type=Path, help='one per config (default: random weights)')
    add('--cfg-options', nargs='+', action=Overrides, help='overrides, model.… of presets')
    add('--part', default='backbone', choices=('backbone', 'model'))
    add('--mode', nargs='+', default=['inference'], choices=('inference', 'train'))
    add('--shapes', nargs='+', default=['800x1280'], metavar='HxW')
    add('--batches', nargs='+', type=positive, default=[1])
    add('--dtypes', nargs='+', default=['float32'], choices=models.DTYPES)
    add('--compile', nargs='+', default=['none'], choices=('none', 'default', 'reduce-overhead'))
    add('--threads', type=positive, help='computing threads')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--rounds', type=positive, default=30)
    add('--warmup', type=int, default=3, help='untimed calls of each candidate')
    add('--max-seconds', type=float, help='per case, after three rounds')
    add('--memory', action='store_true', help='peak memory on the CPU too (on CUDA always)')
    add('--out', type=Path, help='JSON lines, saved after every case')
    add('--resume', action='store_true', help='measure only what --out has not')
    add('--from', dest='sources', nargs='+', type=Path, help='show such files, measure nothing')
    add('--markdown', type=Path, help='write tables for a document')
    add('--plot', type=Path, help='draw speed-up against multiply-adds (PNG)')
    args = parser.parse_args(argv)
    if args.sources and (args.targets or args.out):
        parser.error('--from measures nothing: leave the targets and --out away')
    if not args.sources and not args.targets:
        parser.error(f'name a config file or a preset: {", ".join(PRESETS)}')
    if args.checkpoints and len(args.checkpoints) != len(args.targets):
        parser.error(f'--checkpoints: {len(args.checkpoints)} for {len(args.targets)} targets')
    if args.part == 'model' and (args.timm or 'train' in args.mode):
        parser.error(
            '--part model goes neither with --timm, which has backbones only, nor with --mode '
            'train, which would need annotated images'
        )
    if args.device == 'cpu' and 'reduce-overhead' in args.compile:
        parser.error('--compile reduce-overhead means CUDA graphs: take default on the CPU')
    return args


def read_config(spec: str, args: argparse.Namespace, checkpoint: Path | None) -> Config:
    """The config of a preset or a file.

    Raises:
        UsageError: There is none, or a preset is asked for what it has not.
    """
    if spec in PRESETS:
        if args.part == 'model' or checkpoint is not None:
            raise UsageError(f'{spec} is a bare backbone: no --part model, no --checkpoints')
        return models.load_config(Config(dict(model=PRESETS[spec])), args.cfg_options)
    if not Path(spec).is_file():
        presets = ', '.join(PRESETS)
        raise UsageError(f'{spec} is neither a config file nor a preset; presets: {presets}')
    cfg = models.load_config(spec, args.cfg_options)
    if cfg.get('model') is None:
        raise UsageError(f'{spec} has no model')
    if checkpoint is None and cfg.model.get('backbone', {}).get('init_cfg') is not None:
        # Random weights do as well for timing; nothing is to be fetched.
        cfg.model.backbone.init_cfg = None
    return cfg


def load_target(
    spec: str, args: argparse.Namespace, checkpoint: Path | None = None
) -> tuple[list[Candidate], list[str]]:
    """What is compared on a preset or config, the reference first, and notes on it.

    Models share weights where they can.

    Raises:
        UsageError: There is no such preset or config, or an option does not fit it.
    """
    cfg, name, whole = read_config(spec, args, checkpoint), Path(spec).stem, args.part == 'model'
    model = models.load_model(cfg, checkpoint)
    model = model if whole else getattr(model, 'backbone', model)
    configured = Candidate('as configured', 'config', always(model))
    if not hasattr(getattr(model, 'backbone', model), 'set_keep_ratios'):
        if args.keep_ratios:
            raise UsageError(f'{name} is not idle: it takes no --keep-ratios')
        return [configured], []
    found, notes = [], []
    backbone = cfg.model.get('backbone', cfg.model)
    if not args.against_own:
        try:
            own = models.host_backbone(getattr(model, 'backbone', model), backbone)
            dense = shared_copy(model) if whole else own
            if whole:
                dense.backbone = own
            library = type(own).__module__.split('.')[0]
            found.append(Candidate(f"{library}'s dense", 'host', always(dense)))
        except ValueError as error:
            notes.append(f'no dense class of mmdet or mmseg here: {error}')
    if args.timm:
        if importlib.util.find_spec('timm') is None:
            raise UsageError('--timm: timm is not installed')
        twin, rate = TIMM.get(spec), backbone.get('drop_path_rate', 0.1)
        notes.append(f"timm's twin is {twin}" if twin else 'timm has no twin of it')
        if twin:
            built = functools.lru_cache(1)(lambda shape: timm_twin(twin, shape, rate).eval())
            found.append(Candidate("timm's dense", 'timm', built))
    ratios = args.keep_ratios or ([1.0, 0.7, 0.5] if spec in PRESETS else [])
    for ratio in dict.fromkeys([1.0, *ratios] if 1.0 in ratios or not found else ratios):
        kept = models.scheduled(backbone, ratio) if args.schedule else ratio
        build = always(models.with_keep_ratios(model, kept))
        kind = 'dense' if ratio == 1 else 'idle'
        found.append(Candidate(f'keep {ratio:g}', kind, build, ratio))
    if found[0].kind != 'host':
        notes.append(f'the reference is {found[0].name}')
    if args.as_configured or not ratios:
        found.append(configured)
    return found, [f'{name}: {note}' for note in notes]


def cases_of(target: str, args: argparse.Namespace) -> Iterator[report.Line]:
    """All combinations of conditions; what is given twice comes once."""
    lists = args.mode, args.dtypes, args.compile, models.parse_shapes(args.shapes), args.batches
    for mode, dtype, compiling, shape, batch in itertools.product(*map(dict.fromkeys, lists)):
        where = dict(target=target, part=args.part, shape=list(shape), batch=batch, dtype=dtype)
        how = dict(mode=mode, compile=compiling, device=args.device)
        yield {**where, **how, 'threads': torch.get_num_threads()}


def measure(case: report.Line, candidates: Sequence[Candidate], args: argparse.Namespace) -> None:
    """Time all candidates of a case in turns, count and weigh each, and add what came out to it.

    One that fails, for want of memory or because it cannot be compiled, leaves its reason.
    """
    device, shape = torch.device(case['device']), tuple(case['shape'])
    images: Tensor | None = None
    graphs, reference = case['compile'] == 'reduce-overhead', candidates[0].name
    blank = dict.fromkeys((*report.TIMES, 'multiply_adds', 'memory', 'error'))
    figures: dict[str, dict[str, Any]] = {
        c.name: dict(name=c.name, kind=c.kind, keep=c.keep, **blank) for c in candidates
    }

    def call_to(candidate: Candidate) -> Callable[[], Any]:
        nonlocal images
        model = candidate.build(shape).to(device)
        if images is None:
            images = models.noise_image(shape, device, model, case['batch'])
        *_, count = model_multiply_adds(model, shape).values()
        figures[candidate.name]['multiply_adds'] = count
        return call_of(model, images, case)

    makers = {c.name: functools.partial(call_to, c) for c in candidates}
    compiled = case['compile'] != 'none'
    with measures.strictly_compiled() if compiled else contextlib.nullcontext():
        # CUDA graphs are recorded in the second and third call.
        warmup = max(args.warmup, 5) if graphs else args.warmup
        limits = args.rounds, warmup, args.max_seconds
        calls, seconds, failed = measures.compare_working(makers, reference, *limits)
        for name, why in failed.items():
            figures[name]['error'] = why
        for name, taken in seconds.items():
            times = measures.spread(taken, case['batch'] / 1000)
            ratios = measures.spread(taken, seconds[reference])
            figures[name] |= zip(report.TIMES, (*times, *ratios), strict=True)
            # CUDA graphs keep their memory.
            if not graphs and (args.memory or device.type == 'cuda'):
                with contextlib.suppress(torch.cuda.OutOfMemoryError), torch.no_grad():
                    figures[name]['memory'] = measures.peak_memory(calls[name], device)
    case |= dict(reference=reference, rounds=len(seconds.get(reference, ())))
    case['candidates'] = list(figures.values())


def call_of(model: nn.Module, images: Tensor, case: report.Line) -> Callable[[], Any]:
    """One forward, or one forward and backward, under the conditions of a case."""
    model.train(case['mode'] == 'train')
    whole, backbone = case['part'] == 'model', getattr(model, 'backbone', model)
    if case['compile'] != 'none':
        # For one shape; of a whole model its backbone, in a copy.
        mode = None if case['compile'] == 'default' else case['compile']
        backbone = torch.compile(backbone, mode=mode, dynamic=False)
        if whole:
            model = copy.copy(model)
            model._modules = {**model._modules, 'backbone': backbone}
    samples = models.blank_data_samples(model, images.shape) if whole else None

    def run() -> Any:
        if case['compile'] == 'reduce-overhead':
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(
            images.device.type, models.DTYPES[case['dtype']], case['dtype'] != 'float32'
        ):
            return model(images, samples, mode='predict') if whole else backbone(images)

    def step() -> None:
        with torch.enable_grad():
            loss = sum(output.float().square().mean() for output in run())
        loss.backward()
        model.zero_grad()

    return step if case['mode'] == 'train' else run


def run(args: argparse.Namespace, command: Sequence[str]) -> list[report.Line]:
    """Check everything, then measure case by case; what was measured, and with ``--resume`` before.

    Raises:
        UsageError: An option does not fit.
    """
    lines: list[report.Line] = []
    if args.out is not None and args.out.exists():
        if not args.resume:
            raise UsageError(f'--out {args.out} exists: add --resume, or move it away')
        lines = report.read(args.out)
    measures.started(args.device, args.threads)
    targets: dict[str, list[Candidate]] = {}
    notes: list[str] = []
    for spec, checkpoint in itertools.zip_longest(args.targets, args.checkpoints or ()):
        if (name := Path(spec).stem) in targets:
            raise UsageError(f'targets: {name} is named twice')
        targets[name], own = load_target(spec, args, checkpoint)
        notes += own
    print(*(f'note: {note}' for note in notes), sep='\n')
    about: report.Line = dict(command=shlex.join(['tools/analysis_tools/benchmark.py', *command]))
    about |= dict(machine=measures.machine(), versions=measures.versions(), notes=notes)
    report.add(lines, about, args.out)
    for name, candidates in targets.items():
        for case in cases_of(name, args):
            if not report.is_measured(lines, case, [candidate.name for candidate in candidates]):
                measure(case, candidates, args)
                report.add(lines, case, args.out)
                print(report.case_table(case))
    return lines


@exit_code
def main(argv: Sequence[str] | None = None) -> bool:
    """Measure, or read what was measured, and print; whether a candidate failed."""
    args = parse_args(argv)
    if args.sources:
        lines = [line for path in args.sources for line in report.read(path)]
        print(*(report.case_table(line) for line in lines if 'target' in line), sep='\n')
    else:
        lines = run(args, sys.argv[1:] if argv is None else argv)
    print(report.summary(lines), *report.about(lines), sep='\n')
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report.document(lines), encoding='utf-8')
    if args.plot is not None:
        report.plot(lines, args.plot)
    return any(c['error'] for line in lines for c in line.get('candidates', ()))


if __name__ == '__main__':
    sys.exit(main())
