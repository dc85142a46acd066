"""What blocks share whose attention is within windows.

Shape letters: B images, M windows, N tokens of the map (H * W), R summaries, C channels.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from ..kernels import backend_at
from ..ops import Rows
from ..policies import Plan
from .cost import Work, layers, moves
from .functions import weighted_mean
from .idle_block import IdleBlock
from .tokens import Tokens


class WindowBlock(IdleBlock):
    """A block whose ``attn`` is within windows, or among the map where its ``window_size`` is 0."""

    # Name of the norm before the attention.
    FIRST_NORM: str
    # Windows of the next block hold other tokens.
    holds_summaries = False

    def entering(self, x: Tensor) -> Tensor:
        """What attention sees of tokens (..., C)."""
        return getattr(self, self.FIRST_NORM)(x)

    def attend(self, tokens: Tokens, plan: Plan, keys: Tensor | None) -> tuple[Tensor, None]:
        idle = plan.keys == 'all' and plan.rows is not None
        context = self.entering(tokens.x) if idle else None
        padding = self.entering(tokens.x.new_zeros(self.embed_dims)) if plan.pads_first else None
        now = self.entering(tokens.now)
        return self.attn(now, tokens.hw_shape, plan.rows, context, padding), None

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        return self.attn.kept_share(self.entering(x), hw_shape, mask)

    def summarize(self, x: Tensor, weights: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Weighted mean of the idle tokens of each window: (B, M, C)."""
        if not self.attn.window_size:
            return super().summarize(x, weights, hw_shape)
        layout = self.attn.windows(hw_shape, x.device)
        slots = layout.token_ids.flatten().expand(x.shape[0], -1)
        tokens = backend_at(x).take(x, Rows(slots, padded=layout.has_padding))
        tokens = tokens.unflatten(1, layout.token_ids.shape)
        # Padding has weight 0, whatever was read there.
        return weighted_mean(tokens, F.pad(weights, (0, 1))[:, layout.token_ids])

    def spread(self, summaries: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        if not self.attn.window_size:
            return super().spread(summaries, hw_shape)
        layout = self.attn.windows(hw_shape, summaries.device)
        return summaries[:, layout.slot_ids // layout.token_ids.shape[1]]

    def computing(self, batch: int, hw_shape: tuple[int, int], rows: float) -> Work:
        width, hidden = self.embed_dims, self.ffn.feedforward_channels
        # Keys of a query: what is active of its window, or of the map.
        tokens = math.prod(hw_shape)
        keys = (self.attn.window_size**2 or tokens) * rows / (batch * tokens)
        linear = layers(rows, (width, 3 * width), (width, width), (width, hidden), (hidden, width))
        return (
            linear + Work(pairs=2 * width * rows * keys) + moves(rows * (9 * width + 2 * hidden), 8)
        )
