"""What makes backbones fast is still there, told without a clock: launches, copies and bytes.

Bounds lie a little above what was measured when the optimisations were made. Whoever lowers a
figure lowers its bound; whoever has a good reason to raise one does that in the open. That each
guard notices the loss of what it guards is tested too.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
from backbone_zoo import BY_NAME, image, randomize, stage_blocks
from measures import allocations, peak_of
from operations import count
from torch import Tensor, nn

from idlevit_mm.kernels import CPU, Reference, rows
from idlevit_mm.kernels.convolution import ConvolveRows
from idlevit_mm.kernels.cpu import attention, linear, native, pieces
from idlevit_mm.layers import MergePatches
from idlevit_mm.policies import select

# First stages of published width, on odd maps large enough that inference cuts them in pieces.
_PVT = dict(embed_dims=64, drop_path_rate=0.0)
MODELS = {
    'swin': ('swin-w7', dict(embed_dims=96, depths=(2, 1), num_heads=(3, 6), drop_path_rate=0.0)),
    'pvt': ('pvt', dict(_PVT, num_layers=[2, 1], sr_ratios=[8, 4], mlp_ratios=[8, 8])),
    'pvtv2': (
        'pvtv2',
        dict(_PVT, num_layers=[2, 1, 1, 1], sr_ratios=[8, 4, 2, 1], mlp_ratios=[8, 8, 4, 4]),
    ),
}
INFERENCE_SIZE = (1, 3, 331, 437)
TRAINING_SIZE = (2, 3, 91, 122)
MIB = 2**20

Figures = dict[str, float]


class Guard(NamedTuple):
    """An upper bound.

    Attributes:
        family: Key of ``MODELS``.
        keep: Keep ratio.
        measure: Key of ``LOST``.
        measured: The figure at the time of writing.
        bound: What it must not exceed.
    """

    family: str
    keep: float
    measure: str
    measured: float
    bound: float


LOST = {
    'launches per block': 'work is done in more and smaller steps than before',
    'map copies per block': 'maps are copied more often than before',
    'largest product': 'token matrices go to MKL instead of oneDNN',
    'MiB allocated': 'inference allocates more than before',
    'peak MiB': 'inference holds more at a time: maps are not cut, or windows have all slots',
    'training launches per block': 'training takes more and smaller steps than before',
    'training additions by index': 'gradients are added by index instead of copied',
    'training MiB allocated': 'training allocates more than before',
    'training peak MiB': 'training keeps more for the backward pass than before',
    'training peak of mmdet': 'idle tokens no longer save the memory they did',
}

GUARDS: tuple[Guard, ...] = (
    Guard('swin', 1.0, 'launches per block', 33.67, 37),
    Guard('swin', 1.0, 'map copies per block', 1, 1),
    Guard('swin', 1.0, 'largest product', 0, 8388608),
    Guard('swin', 1.0, 'MiB allocated', 198.87, 208.8),
    Guard('swin', 1.0, 'peak MiB', 26.8, 28.1),
    Guard('swin', 1.0, 'training launches per block', 42, 46),
    Guard('swin', 1.0, 'training additions by index', 0, 0),
    Guard('swin', 1.0, 'training MiB allocated', 67.92, 71.3),
    Guard('swin', 1.0, 'training peak MiB', 26.77, 28.1),
    Guard('swin', 0.5, 'launches per block', 27.67, 30),
    Guard('swin', 0.5, 'map copies per block', 1.33, 1.34),
    Guard('swin', 0.5, 'largest product', 0, 8388608),
    Guard('swin', 0.5, 'MiB allocated', 127, 133.3),
    Guard('swin', 0.5, 'peak MiB', 19.1, 20.1),
    Guard('swin', 0.5, 'training launches per block', 65, 72),
    Guard('swin', 0.5, 'training additions by index', 0, 0),
    Guard('swin', 0.5, 'training MiB allocated', 55.13, 57.9),
    Guard('swin', 0.5, 'training peak MiB', 16.83, 17.7),
    Guard('swin', 0.5, 'training peak of mmdet', 0.53, 0.56),
    Guard('pvt', 1.0, 'launches per block', 50.33, 55),
    Guard('pvt', 1.0, 'map copies per block', 1, 1.0),
    Guard('pvt', 1.0, 'largest product', 4259840, 8388608),
    Guard('pvt', 1.0, 'MiB allocated', 199.45, 209.4),
    Guard('pvt', 1.0, 'peak MiB', 19.07, 20),
    Guard('pvt', 1.0, 'training launches per block', 53.33, 59),
    Guard('pvt', 1.0, 'training additions by index', 0, 0),
    Guard('pvt', 1.0, 'training MiB allocated', 72.25, 75.9),
    Guard('pvt', 1.0, 'training peak MiB', 21.47, 22.6),
    Guard('pvt', 0.5, 'launches per block', 38, 42),
    Guard('pvt', 0.5, 'map copies per block', 0.67, 0.68),
    Guard('pvt', 0.5, 'largest product', 4259840, 8388608),
    Guard('pvt', 0.5, 'MiB allocated', 120.17, 126.2),
    Guard('pvt', 0.5, 'peak MiB', 17.33, 18.2),
    Guard('pvt', 0.5, 'training launches per block', 80, 88),
    Guard('pvt', 0.5, 'training additions by index', 0, 0),
    Guard('pvt', 0.5, 'training MiB allocated', 62.67, 65.9),
    Guard('pvt', 0.5, 'training peak MiB', 15.77, 16.6),
    Guard('pvt', 0.5, 'training peak of mmdet', 0.72, 0.77),
    Guard('pvtv2', 1.0, 'launches per block', 34.2, 38),
    Guard('pvtv2', 1.0, 'map copies per block', 0.6, 0.6),
    Guard('pvtv2', 1.0, 'largest product', 4587520, 8388608),
    Guard('pvtv2', 1.0, 'MiB allocated', 271.41, 285.0),
    Guard('pvtv2', 1.0, 'peak MiB', 24.58, 25.8),
    Guard('pvtv2', 1.0, 'training launches per block', 58, 64),
    Guard('pvtv2', 1.0, 'training additions by index', 0, 0),
    Guard('pvtv2', 1.0, 'training MiB allocated', 116.54, 122.4),
    Guard('pvtv2', 1.0, 'training peak MiB', 37.53, 39.5),
    Guard('pvtv2', 0.5, 'launches per block', 33.6, 37),
    Guard('pvtv2', 0.5, 'map copies per block', 0.4, 0.4),
    Guard('pvtv2', 0.5, 'largest product', 5046272, 8388608),
    Guard('pvtv2', 0.5, 'MiB allocated', 157.23, 165.1),
    Guard('pvtv2', 0.5, 'peak MiB', 16.88, 17.7),
    Guard('pvtv2', 0.5, 'training launches per block', 110, 121),
    Guard('pvtv2', 0.5, 'training additions by index', 0, 0),
    Guard('pvtv2', 0.5, 'training MiB allocated', 134.77, 141.5),
    Guard('pvtv2', 0.5, 'training peak MiB', 29.5, 31.0),
    Guard('pvtv2', 0.5, 'training peak of mmdet', 0.76, 0.8),
)
BOUNDS = {guard[:3]: guard for guard in GUARDS}


def build(family: str, keep: float) -> nn.Module:
    name, options = MODELS[family]
    return randomize(BY_NAME[name].build(keep_ratios=keep, **options)).eval()


@lru_cache(None)
def pixels(size: tuple[int, ...]) -> Tensor:
    return image(size)


def infer(model: nn.Module) -> None:
    with torch.no_grad():
        model(pixels(INFERENCE_SIZE))


def training_step(model: nn.Module) -> None:
    loss = sum(out.square().sum() for out in model(pixels(TRAINING_SIZE)))
    # Gradients that stayed would be freed within the next step, or not, and change its peak.
    torch.autograd.grad(loss, list(model.parameters()))


def memory_of(call: Callable[[], None]) -> tuple[float, float]:
    """MiB a call allocates in all, and holds at most at a time."""
    # Once before, so that index tables are there.
    call()
    gc.collect()
    changes = allocations(call)
    return sum(change for change in changes if change > 0) / MIB, peak_of(changes) / MIB


def inference_operations(family: str, model: nn.Module) -> Figures:
    infer(model)
    operations = count(infer, model)
    blocks = stage_blocks(model)
    map_size = math.prod(side // 4 for side in INFERENCE_SIZE[2:])
    map_size *= blocks[0][0].norm1.normalized_shape[0]
    number = sum(map(len, blocks))
    return {
        'launches per block': operations.launches / number,
        'map copies per block': operations.copies_of_at_least(map_size) / number,
        'largest product': max(operations.products, default=0),
    }


def inference_memory(family: str, model: nn.Module) -> Figures:
    allocated, peak = memory_of(partial(infer, model))
    return {'MiB allocated': allocated, 'peak MiB': peak}


def training_operations(family: str, model: nn.Module) -> Figures:
    training_step(model)
    operations = count(training_step, model, gradients=True)
    return {
        'training launches per block': operations.launches / sum(map(len, stage_blocks(model))),
        'training additions by index': operations.index_additions,
    }


def training_memory(family: str, model: nn.Module) -> Figures:
    allocated, peak = memory_of(partial(training_step, model))
    return {'training MiB allocated': allocated, 'training peak MiB': peak}


def memory_beside_mmdet(family: str, model: nn.Module) -> Figures:
    own = training_memory(family, model)['training peak MiB']
    return {'training peak of mmdet': own / twin_peak(family)}


@lru_cache(None)
def twin_peak(family: str) -> float:
    """MiB that a training step of mmdet's dense class holds at most."""
    name, options = MODELS[family]
    twin = randomize(BY_NAME[name].build_twin('mmdet', **options))
    twin.eval()  # returns None in mmdet
    return training_memory(family, twin)['training peak MiB']


MEASURED_BY: dict[str, Callable[[str, nn.Module], Figures]] = {
    'launches per block': inference_operations,
    'map copies per block': inference_operations,
    'largest product': inference_operations,
    'MiB allocated': inference_memory,
    'peak MiB': inference_memory,
    'training launches per block': training_operations,
    'training additions by index': training_operations,
    'training MiB allocated': training_memory,
    'training peak MiB': training_memory,
    'training peak of mmdet': memory_beside_mmdet,
}


def breach(guard: Guard, value: float) -> str:
    """What is wrong with a figure, in words; '' if nothing is."""
    if value <= guard.bound:
        return ''
    return (
        f'{guard.family} at keep {guard.keep}: {guard.measure} {value:.4g}, at most {guard.bound} '
        f'(was {guard.measured}): {LOST[guard.measure]}'
    )


@pytest.mark.parametrize('keep', [1.0, 0.5])
@pytest.mark.parametrize('family', MODELS)
def test_no_figure_exceeds_its_bound(family: str, keep: float) -> None:
    guards = [guard for guard in GUARDS if guard[:2] == (family, keep)]
    assert {guard.measure for guard in guards} >= set(LOST) - {'training peak of mmdet'}
    found: Figures = {}
    for measure in dict.fromkeys(MEASURED_BY[guard.measure] for guard in guards):
        found |= measure(family, build(family, keep))
    breaches = [breach(guard, found[guard.measure]) for guard in guards]
    assert not any(breaches), '\n'.join(filter(None, breaches))


def undo_onednn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear, '_pays', lambda x, weight, site: False)


def undo_pieces(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CPU, 'by_tokens', Reference.by_tokens)
    patch.setattr(CPU, 'channel_parts', Reference.channel_parts)
    patch.setattr(attention, 'in_pieces', lambda function, x, width: function(x))


def cut_too_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pieces, '_MIN_ROWS', 64)
    patch.setattr(pieces, '_PIECE', 2**17)


def undo_kernels_in_c(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native, 'usable', lambda *_, **__: False)


def keep_maps_for_backward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ConvolveRows, 'apply', lambda *args: ConvolveRows.forward(*args))


def undo_merging(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MergePatches, '_pairs', lambda self: False)


def add_by_index(patch: pytest.MonkeyPatch) -> None:
    def take(flat: Tensor, ids: Tensor, padded: bool) -> Tensor:
        return flat[ids.clamp(max=len(flat) - 1)]

    patch.setattr(rows._TakeRows, 'apply', take)


def copy_the_map_once_more(patch: pytest.MonkeyPatch) -> None:
    put = Reference.put
    for backend, name in ((Reference, 'put'), (CPU, 'overwrite')):
        patch.setattr(backend, name, lambda self, x, *args: put(self, x.clone(), *args))


def compute_all_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(select, 'num_active', lambda keep, units, _: units)


NOTICED: tuple[tuple[Callable[[pytest.MonkeyPatch], None], str, float, str], ...] = (
    (undo_onednn, 'swin', 0.5, 'largest product'),
    (undo_onednn, 'pvtv2', 0.5, 'largest product'),
    (undo_pieces, 'swin', 1.0, 'peak MiB'),
    (undo_pieces, 'pvtv2', 1.0, 'peak MiB'),
    (undo_pieces, 'pvtv2', 0.5, 'peak MiB'),
    (cut_too_small, 'swin', 0.5, 'launches per block'),
    (cut_too_small, 'pvtv2', 0.5, 'launches per block'),
    (undo_kernels_in_c, 'swin', 0.5, 'peak MiB'),
    (undo_kernels_in_c, 'swin', 1.0, 'training peak MiB'),
    (undo_kernels_in_c, 'swin', 0.5, 'training peak of mmdet'),
    (undo_kernels_in_c, 'swin', 0.5, 'training launches per block'),
    (undo_kernels_in_c, 'swin', 0.5, 'training peak MiB'),
    (keep_maps_for_backward, 'pvtv2', 0.5, 'training peak MiB'),
    (undo_merging, 'swin', 1.0, 'largest product'),
    (undo_merging, 'swin', 0.5, 'training additions by index'),
    (add_by_index, 'swin', 0.5, 'training additions by index'),
    (add_by_index, 'pvtv2', 0.5, 'training additions by index'),
    (copy_the_map_once_more, 'swin', 0.5, 'map copies per block'),
    (copy_the_map_once_more, 'pvtv2', 0.5, 'map copies per block'),
    (compute_all_tokens, 'swin', 0.5, 'MiB allocated'),
    (compute_all_tokens, 'swin', 0.5, 'training MiB allocated'),
    (compute_all_tokens, 'pvt', 0.5, 'training peak of mmdet'),
)


@pytest.mark.parametrize(
    ('undo', 'family', 'keep', 'measure'),
    NOTICED,
    ids=[f'{undo.__name__}-{family}-{keep}-{measure}' for undo, family, keep, measure in NOTICED],
)
def test_the_guard_notices(
    undo: Callable[[pytest.MonkeyPatch], None],
    family: str,
    keep: float,
    measure: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if measure == 'training peak of mmdet':
        # As it is, not as undone.
        twin_peak(family)
    undo(monkeypatch)
    value = MEASURED_BY[measure](family, build(family, keep))[measure]
    assert LOST[measure] in breach(BOUNDS[family, keep, measure], value)


def test_every_measure_is_noticed_by_some_loss() -> None:
    assert {measure for *_, measure in NOTICED} == set(LOST) == set(MEASURED_BY)
