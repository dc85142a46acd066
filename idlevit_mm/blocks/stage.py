"""A row of idle blocks on one map, and the record of what they did.

Shape letters: B images, S rows (the map, then P class tokens, then what a policy has appended), C
channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import tell_why_not
from ..ops import Extent, row_mask
from ..policies import Plan
from .functions import numbers
from .idle_block import IdleBlock
from .tokens import Carried, Tokens


class StageRecord(NamedTuple):
    """What a stage did in a forward pass.

    Attributes:
        batch: Number of images.
        hw_shape: Height and width of the map in tokens.
        device: Where the map lies.
        plans: For each block what it did, less who attended, weights of summaries and gates.
        num_class: P.
        inputs: For each block its input (B, S, C), in the autograd graph; None where the block was
            dense; empty unless asked for.
    """

    batch: int
    hw_shape: tuple[int, int]
    device: torch.device
    plans: Sequence[Plan]
    num_class: int = 0
    inputs: Sequence[Tensor | None] = ()

    def keep_mask(self, block: int) -> Tensor:
        """Tokens of the map that were active in a block: (B, H, W), bool."""
        rows, shape = self.plans[block].rows, (self.batch, *self.hw_shape)
        if rows is None:
            return torch.ones(shape, dtype=torch.bool, device=self.device)
        return row_mask(rows, shape[1] * shape[2]).view(shape)


class Relay:
    """What a policy remembers at the end of a stage, and the map it is of, for the next stage.

    Attributes:
        after: What the stage that gets this one leaves. Its own it does not change: a stage that is
            recomputed in the backward pass must find what it found before.
    """

    after: 'Relay'

    # No dataclass: wrappers of modules make copies of those, and what a stage writes would be lost.
    def __init__(self, state: Any = None, hw_shape: tuple[int, int] = (0, 0)) -> None:
        self.state = state
        self.hw_shape = hw_shape


def run_blocks(
    blocks: Iterable[IdleBlock],
    x: Tensor,
    hw_shape: tuple[int, int],
    keep_ratios: Sequence[float],
    record_inputs: bool = False,
    taps: Mapping[int, Callable[[Tensor], Any]] | None = None,
    extent: Extent | None = None,
    relay: Relay | None = None,
    encode: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
    owned: bool = False,
) -> tuple[list[Any], StageRecord]:
    """Run the blocks of a stage on the tokens x (B, S, C).

    Args:
        blocks: The blocks.
        x: All tokens.
        hw_shape: Height and width of the map in tokens.
        keep_ratios: One for each block.
        record_inputs: Whether the record holds the inputs of the blocks that idle.
        taps: For blocks after which the tokens are wanted, what makes an output of them; None for
            the tokens after the last block.
        extent: Which tokens belong to their images, the others being padding; None where all do.
        relay: What the stage before has left; None where there is none. What this one leaves is
            its ``after``.
        encode: What all tokens go through after the first block, idle or not.
        owned: Whether nobody but the caller holds x, and it has no more use for it.

    Returns:
        The outputs, in the order of the blocks, and the record.
    """
    tell_why_not(x)
    blocks, plans, relay = list(blocks), [], relay or Relay()
    state = blocks[0].policy.entering(relay.state, relay.hw_shape, numbers(hw_shape))
    carried = Carried(state=state, owned=owned, extent=extent)
    taps = {len(blocks) - 1: lambda tokens: tokens} if taps is None else taps
    inputs: list[Tensor | None] = []
    outs: list[Any] = []
    for index, (block, keep_ratio) in enumerate(zip(blocks, keep_ratios, strict=True)):
        if record_inputs:
            before = block.settled(Tokens(x, hw_shape, carried.pack))
            x, carried = before, Carried(None, carried.plan, carried.state, extent=extent)
        if block.payer is not None:
            keep_ratio = block.payer.keep_ratio(block, x, numbers(hw_shape), keep_ratio)
        x, carried = block(x, hw_shape, keep_ratio, carried)
        # Gates and weights of summaries may hold the graph of the pass.
        plans.append(carried.plan.but(summary=None, gate=None, attends=None))
        if record_inputs:
            inputs.append(None if carried.plan.rows is None else before)
        if encode is not None and index == 0:
            x = encode(block.settled(Tokens(x, hw_shape, carried.pack)), hw_shape)
            carried = Carried(None, carried.plan, carried.state, extent=extent)
        if index in taps:
            carried = Carried(carried.pack, carried.plan, carried.state, extent=extent)
            outs.append(taps[index](block.settled(Tokens(x, hw_shape, carried.pack))))
    relay.after = Relay(carried.state, numbers(hw_shape))
    num_class = blocks[0].num_class
    return outs, StageRecord(x.shape[0], hw_shape, x.device, plans, num_class, inputs)
