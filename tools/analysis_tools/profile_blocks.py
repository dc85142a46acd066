"""Time the parts of idle blocks: what scoring, selecting, gathering and scattering cost.

All of it is in relation to the time of the blocks of each stage, and of all blocks; beside it the
time that is predicted, and with --predict the speed-up on devices that are not at hand.
"""

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from measures import machine, started, versions
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.cost import predicted_speedups, stage_seconds
from idlevit_mm.analysis.models import idle_backbone, load_model, noise_image, parse_shapes
from idlevit_mm.analysis.results import exit_code
from idlevit_mm.engine.options import Overrides
from idlevit_mm.errors import UsageError
from idlevit_mm.kernels import BACKENDS, PACES, convolution, pace_of

# Parts of a block that a dense one does not have, and all parts.
IDLING = ['scoring', 'selecting', 'gathering', 'scattering']
PARTS = [*IDLING, 'attention core', 'attention, rest', 'feed-forward', 'rest']
OUTSIDE, BACKWARD = 'outside the blocks', 'backward pass'
# Methods of blocks and entries of backends by the part that they are, and functions.
METHODS = dict(forward='rest', look='scoring', planned='selecting', opened='gathering')
METHODS |= dict(settled='scattering', regrouped='scattering', attend='attention, rest')
METHODS |= dict(transform='feed-forward')
ENTRIES = dict(take='gathering', put='scattering', overwrite='scattering')
ENTRIES |= dict.fromkeys(('attend', 'attend_windows'), 'attention core')
FUNCTIONS = [(convolution, 'take_rows', 'gathering'), (convolution, 'fill_map', 'scattering')]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('target', help='a config, or the registered name of an idle backbone for its defaults')
    add('--keep-ratios', nargs='+', type=float, help='one for all blocks, or one per stage')
    add('--shape', nargs='+', default=['512x512'], metavar='HxW')
    add('--batch', type=int, default=1)
    add('--mode', choices=('inference', 'training'), default='inference')
    add('--rounds', type=int, default=20)
    add('--warmup', type=int, default=3)
    add('--threads', type=int, help='computing threads')
    add('--device', default='cpu')
    add('--predict', nargs='+', choices=sorted(PACES), help='speed-ups in bf16 on these devices')
    add('--out', type=Path, help='write the figures to this JSON file')
    add('--cfg-options', nargs='+', action=Overrides, help='overrides')
    return parser.parse_args()


@contextmanager
def labelled(backbone: Any) -> Iterator[None]:
    """Have the profiler see the parts of blocks, as long as it lasts."""
    found: list[Any] = [(owner, name, f'|{part}') for owner, name, part in FUNCTIONS]
    found += [(backend, name, f'|{part}') for backend in BACKENDS for name, part in ENTRIES.items()]
    for stage, blocks in enumerate(backbone.idle_blocks):
        for block in blocks:
            found += [(block, name, f'{stage}|{part}') for name, part in METHODS.items()]
            found.append((block.policy, 'between', f'{stage}|selecting'))
    with ExitStack() as stack:
        for owner, name, text in found:
            own = record_function(f'idle|{text}')(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, own))
        yield


def charges(events: Iterable[Any], on_cpu: bool = True) -> Counter[tuple[int, str]]:
    """Seconds by stage (-1 outside) and part; each moment belongs to the innermost part."""

    @functools.cache
    def label_of(event: Any) -> tuple[int, str]:
        if event is None:
            return -1, OUTSIDE
        stage, around = label_of(event.cpu_parent)
        if around == BACKWARD or event.name.startswith('autograd::engine'):
            return -1, BACKWARD
        _, number, part = [*event.name.split('|'), '', ''][:3]
        stage = int(number) if number else stage
        return stage, part if part and stage >= 0 else around

    totals: Counter[tuple[int, str]] = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = event.self_cpu_time_total if on_cpu else event.self_device_time_total
            totals[label_of(event)] += own / 1e6
    return totals


def profile_blocks(
    model: nn.Module, inputs: Tensor, mode: str = 'inference', rounds: int = 20, warmup: int = 3
) -> dict[str, Any]:
    """Medians over forward passes on images (B, C, H, W), in seconds, ready for JSON.

    'training' is the forward pass with gradients to come and with dropout, and the backward pass as
    a whole.

    Raises:
        TypeError: The model has no idle backbone.
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f'rounds={rounds} must be at least 1')
    backbone, training = idle_backbone(model), mode == 'training'
    on_cpu = inputs.device.type == 'cpu'
    activities = [ProfilerActivity.CPU, *([] if on_cpu else [ProfilerActivity.CUDA])]
    seen = []
    backbone.train(training)
    with torch.set_grad_enabled(training), labelled(backbone):
        for index in range(warmup + rounds):
            with profile(activities=activities) if index >= warmup else nullcontext() as profiler:
                outs = backbone(inputs)
                if training:
                    sum(out.float().mean() for out in tree_leaves(outs)).backward()
                    backbone.zero_grad()
            if profiler is not None:
                seen.append(charges(profiler.events(), on_cpu))
    backbone.eval()
    medians = pd.DataFrame(seen).fillna(0.0).median().to_dict()
    numbers = range(len(backbone.idle_blocks))
    stages = [{part: medians.get((stage, part), 0.0) for part in PARTS} for stage in numbers]
    table = pd.DataFrame(stages)
    try:
        predicted = stage_seconds(backbone, pace_of(inputs.device), inputs.dtype)
    except NotImplementedError:  # a family of one's own may not say what it costs
        predicted = [float('nan')] * len(stages)
    return {
        'seconds_of_stages': stages,
        'predicted_seconds_of_stages': predicted,
        'seconds_outside_blocks': medians.get((-1, OUTSIDE), 0.0),
        'seconds_backward': medians.get((-1, BACKWARD)) if training else None,
        'idling_share_of_stages': (table[IDLING].sum(axis=1) / table.sum(axis=1)).tolist(),
        'idling_share': table[IDLING].sum().sum() / table.sum().sum(),
    }


def table_of(found: dict[str, Any]) -> str:
    """One row per part, one column per stage and one for all blocks: milliseconds and share."""
    table = pd.DataFrame(found['seconds_of_stages']).T.rename(columns=lambda i: f'stage {i + 1}')
    table['all blocks'] = table.sum(axis=1)
    shares = (table / table.sum()).map('({:5.1%})'.format)
    shown = (1000 * table).map('{:.2f} '.format) + shares
    shown.loc['sum'] = (1000 * table.sum()).map('{:.2f}'.format)
    if found['seconds_backward'] is None:
        guess = pd.Series([*found['predicted_seconds_of_stages'], 0.0], index=table.columns)
        guess.iloc[-1] = guess.sum()
        off = guess / table.sum() - 1
        shown.loc['predicted'] = (1000 * guess).map('{:.2f} '.format) + off.map('({:+.1%})'.format)
    idling = [*found['idling_share_of_stages'], found['idling_share']]
    shown.loc[', '.join(IDLING)] = [f'{share:.1%}' for share in idling]
    align = ['left', *['right'] * len(shown.columns)]
    return shown.to_markdown(disable_numparse=True, colalign=align)


@exit_code
def main() -> None:
    """Profile and print."""
    args = parse_args()
    device = started(args.device, args.threads)
    is_file = Path(args.target).is_file()
    if not is_file and args.target not in MODELS.module_dict:
        raise UsageError(
            f'target {args.target!r} is neither a config file nor a registered name such as '
            'IdleSwinTransformer'
        )
    config = args.target if is_file else Config(dict(model=dict(type=args.target)))
    model = load_model(config, device=device, cfg_options=args.cfg_options)
    if ratios := args.keep_ratios:
        idle_backbone(model).set_keep_ratios(ratios[0] if len(ratios) == 1 else ratios)
    threads = torch.get_num_threads()
    place = f'{threads} threads' if args.device == 'cpu' else args.device
    profiles: dict[str, dict[str, Any]] = {}
    for height, width in parse_shapes(args.shape):
        images = noise_image((height, width), device, model, args.batch)
        found = profile_blocks(model, images, args.mode, args.rounds, args.warmup)
        profiles[f'{height}x{width}'] = found
        print(f'{Path(args.target).stem}, {tuple(images.shape)}, {args.mode}, {place}')
        print(table_of(found))
        for key, name in (('outside_blocks', OUTSIDE), ('backward', BACKWARD)):
            if found[f'seconds_{key}'] is not None:
                print(f'{name}: {1000 * found[f"seconds_{key}"]:.2f} ms')
    if args.predict:
        # Of the last size.
        backbone, ratios = idle_backbone(model), (0.9, 0.7, 0.5)
        table = predicted_speedups(backbone, args.predict, ratios, torch.bfloat16)
        print(f'Predicted speed-up of all blocks in bf16, not measured:\n{table.to_markdown()}')
    print(f'{machine()}; {versions()}')
    if args.out is not None:
        about = dict(vars(args), out=None, keep_ratios=idle_backbone(model).keep_ratios)
        about |= dict(threads=threads, machine=machine(), versions=versions(), profiles=profiles)
        args.out.write_text(json.dumps(about, indent=2) + '\n')


if __name__ == '__main__':
    sys.exit(main())
