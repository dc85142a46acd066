"""Position tables and their resizing.

Shape letters: N places of a table (H * W), C channels, A heads.
"""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from ..kernels import exact
from ..ops import to_map, to_tokens


def resize_position_table(
    table: Tensor, old_shape: tuple[int, int], new_shape: tuple[int, int], mode: str
) -> Tensor:
    """Interpolate an absolute position table of shape (1, N, C) to (1, H' * W', C).

    ``mode`` is one of torch's, or with ``-aa`` behind it to smooth where the table shrinks.
    """
    if old_shape == new_shape:
        return table
    plain = mode.removesuffix('-aa')
    smooth = plain != mode
    # The CPU cannot smooth in half precision.
    grid = to_map(exact(table) if smooth else table, old_shape)
    resized = F.interpolate(grid, size=new_shape, mode=plain, antialias=smooth)
    return to_tokens(resized).to(table.dtype)


class AbsolutePositionEmbedding(BaseModule):
    """PVT's learned position table, resized to each map (arXiv 2102.12122).

    Args:
        pos_shape: Height and width of the table.
        pos_dim: Channels.
        drop_rate: Dropout of the sum.
    """

    def __init__(self, pos_shape: tuple[int, int], pos_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.pos_shape = pos_shape
        self.pos_embed = nn.Parameter(torch.zeros(1, pos_shape[0] * pos_shape[1], pos_dim))
        self.drop = nn.Dropout(p=drop_rate)

    def init_weights(self) -> None:
        """Draw the table from a truncated normal distribution."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Add the table, resized to ``hw_shape``, to tokens of shape (B, N, C)."""
        return self.drop(x + self._resized(hw_shape))

    def fold_table(self, hw_shape: tuple[int, int]) -> None:
        """Resize the table for good, so that maps of this size are nothing to resize for."""
        self.pos_embed = nn.Parameter(self._resized(hw_shape).detach())
        self.pos_shape = hw_shape

    def _resized(self, hw_shape: tuple[int, int]) -> Tensor:
        return resize_position_table(self.pos_embed, self.pos_shape, hw_shape, mode='bilinear')


class ConditionalPositionEncoding(BaseModule):
    """A depth-wise convolution of the map, added to it (arXiv 2102.10882).

    Args:
        embed_dims: Channels of the tokens.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Encode the map among tokens (B, S, C); rows behind it have no position."""
        count = hw_shape[0] * hw_shape[1]
        tokens, others = x[:, :count], x[:, count:]
        tokens = tokens + to_tokens(self.proj(to_map(tokens, hw_shape)))
        return torch.cat([tokens, others], dim=1) if others.shape[1] else tokens
