"""Spatial-reduction attention on packed tokens.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels.
"""

from typing import Any

from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..ops import pad_to, to_map, to_tokens
from .attention import PackedAttention
from .share import cell_means, kept_share


class SpatialReductionAttention(PackedAttention):
    """Attention of the active tokens to the spatially reduced whole map (arXiv 2102.12122).

    Idle tokens stay visible as context: keys and values come from the whole map.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        norm_cfg: Norm after the reduction.
        sr_ratio: Side of the cells, in tokens, that give one key each; 1 for no reduction.
        **kwargs: Further arguments of ``PackedAttention``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        norm_cfg: dict | None = None,
        sr_ratio: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dims, num_heads, **kwargs)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, stride=sr_ratio)
            self.norm = build_norm_layer(norm_cfg or dict(type='LN'), embed_dims)[1]

    def forward(self, queries: Tensor, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The branch of normalised queries (B, T + R, C) among the normalised map x (B, N, C)."""
        return self.branch(queries, self.reduce(x, hw_shape))[0]

    def reduce(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens that serve as keys: (B, N, C) to (B, cells, C).

        A map smaller than one cell, which mmdet's class refuses, is padded with zeros to one.
        """
        if self.sr_ratio == 1:
            return x
        cells = self.sr(pad_to(to_map(x, hw_shape), self.sr_ratio, self.sr_ratio))
        return self.norm(to_tokens(cells))

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """Share of attention as in ``IdleBlock.kept_share``, of normalised tokens.

        Keys are cells: one is as active as the mean of its tokens. Tokens that the convolution
        leaves out because they fill no cell are no keys.
        """
        query = self.project(x, 0, 1)
        key = self.project(self.reduce(x, hw_shape), 1, 2)
        columns = mask.reshape(*mask.shape[:2], -1)
        if self.sr_ratio > 1:
            columns = cell_means(columns, hw_shape, self.sr_ratio)
        return kept_share(query, key, columns, self.scale / self.num_heads).view(mask.shape)
