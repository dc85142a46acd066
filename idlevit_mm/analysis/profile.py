"""Where the time of idle blocks goes.

Nothing in the package is written for being measured: calls are replaced while a profile runs, by
names that every block has (``scorer``, ``planned``, ``opened``, ``settled``, ``attn``, ``ffn``), by
entries of the backends and by PyTorch's own functions below them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlevit_mm import kernels
from idlevit_mm.analysis.latency import Spread
from idlevit_mm.analysis.meter import OTHER, Call, clock, metered
from idlevit_mm.analysis.models import idle_backbone
from idlevit_mm.kernels import BACKENDS

# Parts of a block that a dense one does not have.
IDLING = ('scoring', 'selecting', 'gathering', 'scattering')
BLOCK_PARTS = (
    *IDLING,
    'norms',
    'projections',
    'attention core',
    'attention, rest',
    'feed-forward',
    'rest',
)
MODES = ('inference', 'training')


@dataclass(frozen=True)
class BlockProfile:
    """Seconds of one forward pass, medians over several.

    Attributes:
        stages: for each stage ``{part of the blocks: seconds}``, all of ``BLOCK_PARTS``.
        outside: seconds outside the blocks: patch embedding, merges, norms of the outputs.
        backward: seconds of the backward pass; None at inference.
    """

    stages: tuple[dict[str, float], ...]
    outside: float
    backward: float | None = None

    @property
    def blocks(self) -> dict[str, float]:
        """All stages together: ``{part: seconds}``."""
        return {part: sum(stage[part] for stage in self.stages) for part in BLOCK_PARTS}

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        columns = [*self.stages, self.blocks]
        return {
            'seconds_of_stages': list(self.stages),
            'seconds_outside_blocks': self.outside,
            'seconds_backward': self.backward,
            'idling_share_of_stages': [idling_share(stage) for stage in self.stages],
            'idling_share': idling_share(columns[-1]),
        }


def idling_share(parts: Mapping[str, float]) -> float:
    """Share of the time of blocks that goes into scoring, selecting, gathering and scattering."""
    return sum(parts[part] for part in IDLING) / (sum(parts.values()) or 1.0)


def profile_blocks(
    model: nn.Module,
    inputs: Tensor,
    *,
    mode: str = 'inference',
    rounds: int = 20,
    warmup: int = 3,
    reading: Callable[[], float] = clock,
) -> BlockProfile:
    """Time the parts of all blocks of an idle backbone.

    Borders between parts cost about a microsecond each on the CPU. On a GPU every border waits for
    the device, so that what usually overlaps is timed one after the other.

    Args:
        model: A detector or segmentor with an idle backbone, or the backbone.
        inputs: (B, 3, H, W), normalised and padded.
        mode: 'inference'; or 'training' for the forward pass with gradients to come and with
            dropout, and the backward pass as a whole.
        rounds: Forward passes that are timed.
        warmup: Forward passes before these.
        reading: The clock, in seconds.

    Returns:
        Medians over the rounds.

    Raises:
        TypeError: The model has no idle backbone.
        ValueError: ``mode`` or ``rounds`` is not allowed.
    """
    if mode not in MODES:
        raise ValueError(f'mode={mode!r} must be one of {", ".join(MODES)}')
    if rounds < 1 or warmup < 0:
        raise ValueError(f'rounds={rounds} must be at least 1 and warmup={warmup} at least 0')
    backbone = idle_backbone(model)
    training = mode == 'training'
    was_training = backbone.training
    seen: list[dict[str, float]] = []
    backbone.train(training)
    try:
        with torch.set_grad_enabled(training), metered(_block_calls(backbone), reading) as meter:
            for index in range(warmup + rounds):
                meter.restart()
                outs = backbone(inputs)
                if training:
                    meter.enter('backward')
                    sum(out.float().mean() for out in _tensors(outs)).backward()
                    meter.leave()
                    backbone.zero_grad()
                meter.charge()
                if index >= warmup:
                    seen.append(dict(meter.totals))
    finally:
        backbone.train(was_training)

    def median(label: str) -> float:
        return Spread.of([totals.get(label, 0.0) for totals in seen]).median

    stages = tuple(
        {part: median(f'{stage}/{part}') for part in BLOCK_PARTS}
        for stage in range(len(backbone.idle_blocks))
    )
    return BlockProfile(stages, median(OTHER), median('backward') if training else None)


def _tensors(outs: Any) -> Iterator[Tensor]:
    """All tensors of nested lists and tuples."""
    if isinstance(outs, Tensor):
        yield outs
    else:
        for out in outs:
            yield from _tensors(out)


def _within(part: str, around: Sequence[str] | None = None) -> Callable[[str], str]:
    """Label of a part of the block that runs, if it runs in one of some parts of it."""

    def label(running: str) -> str:
        stage, inside, outer = running.partition('/')
        if not inside or (around is not None and outer not in around):
            return running
        return f'{stage}/{part}'

    return label


def _block_calls(backbone: Any) -> Iterator[Call]:
    """What is measured of the blocks; what a block does not have is left out."""
    for stage, blocks in enumerate(backbone.idle_blocks):
        for block in blocks:
            yield Call(f'{stage}/rest', block, 'forward')
            yield Call(_within('scoring'), block, '_seen')
            yield Call(_within('scoring'), block.policy.scorer, 'forward')
            yield Call(_within('selecting'), block, 'planned')
            yield Call(_within('selecting'), block.policy, 'between')
            yield Call(_within('gathering'), block, 'opened')
            yield Call(_within('scattering'), block, 'settled')
            yield Call(_within('scattering'), block, 'regrouped')
            # Scoring may use the block's own layers.
            yield Call(_within('attention, rest', ['rest']), block.attn, 'forward')
            yield Call(_within('feed-forward', ['rest']), block.ffn, 'forward')
    attention = ['attention, rest']
    for backend in BACKENDS:
        yield Call(_within('gathering'), backend, 'take')
        yield Call(_within('scattering'), backend, 'put')
        yield Call(_within('scattering'), backend, 'fill')
        yield Call(_within('attention core', attention), backend, 'attend')
        yield Call(_within('attention core', attention), backend, 'attend_windows')
    yield Call(_within('gathering'), kernels.cpu, 'pack_windows')
    yield Call(_within('gathering'), kernels.cpu, 'pack_whole_windows')
    yield Call(_within('attention core', attention), F, 'scaled_dot_product_attention')
    yield Call(_within('projections', attention), F, 'linear')
    yield Call(_within('projections', attention), F, 'conv2d')
    yield Call(_within('projections', attention), torch, 'mkldnn_convolution')
    yield Call(_within('projections', attention), torch.ops.mkldnn, '_linear_pointwise')
    yield Call(_within('norms', ['rest', *attention]), F, 'layer_norm')
