"""Attention of a plain ViT on packed tokens.

Shape letters: B images, S rows (the map, then class tokens), T computed rows, C channels.
"""

from typing import Any

from mmcv.cnn.bricks.scale import LayerScale
from torch import Tensor, nn

from .attention import PackedAttention
from .share import kept_share


class SelfAttention(PackedAttention):
    """Attention of a plain ViT among the computed rows.

    Args:
        *args: Those of its base, as are further keyword arguments.
        layer_scale: What the factors of the branch's channels begin with; 0 for none.
    """

    def __init__(self, *args: Any, layer_scale: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # mmpretrain's name, as is the FFN's gamma2.
        self.gamma1 = (
            LayerScale(self.embed_dims, scale=layer_scale) if layer_scale else nn.Identity()
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Compute the branch as ``PackedAttention.branch`` does, and scale its channels."""
        branch, row = self.branch(*args, **kwargs)
        return self.gamma1(branch), row

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """Share of attention as in ``IdleBlock.kept_share``, of normalised tokens."""
        query, key = self.project(x, 0, 2).chunk(2, dim=-1)
        return kept_share(query, key, mask, self.scale / self.num_heads)

    def class_query(self, x: Tensor, place: int, with_keys: bool) -> tuple[Tensor, Tensor | None]:
        """Mean over heads of one row's query times the key of each: (B, S), and the keys.

        Of all normalised tokens x (B, S, C). Without keys the key projection is folded with the
        query, for S * C instead of S * C ** 2 multiply-adds.
        """
        query = self.project(x[:, place], 0, 1) / self.num_heads
        if with_keys:
            keys = self.project(x, 1, 2)
            return (keys @ query[..., None]).squeeze(-1), keys
        weight, bias = self.weights()
        part = slice(self.embed_dims, 2 * self.embed_dims)
        scores = (x @ (query @ weight[part])[..., None]).squeeze(-1)
        return scores if bias is None else scores + (query @ bias[part])[:, None], None
