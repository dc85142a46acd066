"""What blocks share whose attention is within windows.

Shape letters: B images, M windows, N tokens of the map (H * W), R summaries, C channels.
"""

import math

import torch
from torch import Tensor

from ..ops import WindowLayout
from ..policies import Plan
from .cost import Work, block_work
from .functions import without_cells
from .idle_block import IdleBlock
from .tokens import Tokens


class WindowBlock(IdleBlock):
    """A block whose ``attn`` is within windows, or among the map where its ``window_size`` is 0."""

    # Windows of the next block hold other tokens.
    holds_summaries = False

    def attend(self, tokens: Tokens, plan: Plan, keys: Tensor | None) -> tuple[Tensor, None]:
        idle = plan.keys == 'all' and plan.rows is not None
        context = self.entering(tokens.x) if idle else None
        padding = self.entering(tokens.x.new_zeros(self.embed_dims)) if plan.pads_first else None
        now = self.entering(tokens.now)
        if not self.attn.window_size and plan.summary is not None:
            context = without_cells(now, plan, self.summary_size)
        return self.attn(now, tokens.hw_shape, plan.rows, context, padding), None

    def groups(self, hw_shape: tuple[int, int], device: torch.device) -> WindowLayout | None:
        if not self.attn.window_size:
            return super().groups(hw_shape, device)
        return self.attn.windows(hw_shape, device)

    def computing(
        self, batch: int, hw_shape: tuple[int, int], rows: float, attending: float
    ) -> Work:
        # Keys of a query: what is active of its window, or of the map.
        tokens = math.prod(hw_shape)
        keys = (self.attn.window_size**2 or tokens) * attending / (batch * tokens)
        hidden = self.ffn.feedforward_channels
        return block_work(self.embed_dims, hidden, rows, attending, keys)
