"""A row of idle blocks on one map, and the record of what they did.

Shape letters: B images, N tokens of the map (H * W), P tokens before the map (class token), C
channels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Selection, keep_mask
from .idle_block import IdleBlock


class StageRecord(NamedTuple):
    """What a stage did in a forward pass.

    Attributes:
        batch: Number of images.
        hw_shape: Height and width of the map in tokens.
        device: Where the map lies.
        selections: For each block the active units; None where the block was dense.
        num_prefix: P, tokens before those of the map.
        inputs: For each block its input (B, P + N, C), in the autograd graph; None where the block
            was dense; empty unless asked for.
    """

    batch: int
    hw_shape: tuple[int, int]
    device: torch.device
    selections: list[Selection | None]
    num_prefix: int = 0
    inputs: Sequence[Tensor | None] = ()

    def keep_mask(self, block: int) -> Tensor:
        """Tokens of the map that were active in a block: (B, H, W), bool."""
        height, width = self.hw_shape
        selection = self.selections[block]
        if selection is None:
            shape = self.batch, height, width
            return torch.ones(shape, dtype=torch.bool, device=self.device)
        # Ids behind the map are tokens that a policy has added.
        end = self.num_prefix + height * width
        selection = selection._replace(token_ids=selection.token_ids.clamp(max=end))
        mask = keep_mask(selection, end)[:, self.num_prefix :]
        return mask.view(self.batch, height, width)


def run_blocks(
    blocks: Iterable[IdleBlock],
    x: Tensor,
    hw_shape: tuple[int, int],
    keep_ratios: Sequence[float],
    num_prefix: int = 0,
    record_inputs: bool = False,
    after_block: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, StageRecord]:
    """Run the blocks of a stage on the tokens x (B, P + N, C).

    Args:
        blocks: The blocks.
        x: All tokens.
        hw_shape: Height and width of the map in tokens.
        keep_ratios: One for each block.
        num_prefix: P.
        record_inputs: Whether the record holds the inputs of the blocks that idle.
        after_block: Called with the number of each block and the tokens after it.
    """
    memory: Any = None
    selections: list[Selection | None] = []
    inputs: list[Tensor | None] = []
    for index, (block, keep_ratio) in enumerate(zip(blocks, keep_ratios, strict=True)):
        before = x
        x, selection, memory = block(x, hw_shape, keep_ratio, memory)
        selections.append(selection)
        if record_inputs:
            inputs.append(None if selection is None else before)
        if after_block is not None:
            after_block(index, x)
    record = StageRecord(x.shape[0], hw_shape, x.device, selections, num_prefix, inputs)
    return x, record
