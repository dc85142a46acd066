"""Attention of a plain ViT on packed tokens.

Shape letters: B images, N tokens of the map (H * W), P tokens before the map (class token), T
active tokens, C channels, A heads, D channels of a head.
"""

import torch
from torch import Tensor

from ..ops import full_precision
from .attention import PackedAttention, split_heads
from .share import kept_share


class SelfAttention(PackedAttention):
    """Attention of a plain ViT among the active tokens; arguments are those of its base."""

    def forward(
        self,
        x: Tensor,
        keys: Tensor | None = None,
        context: Tensor | None = None,
        first_row: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the branch, without the identity.

        Args:
            x: (B, T, C), the normalised active tokens.
            keys: (B, T, C), the keys if they are known already; (B, P + N, C) with a context.
            context: (B, P + N, C), all normalised tokens, if idle ones serve as keys and values.
            first_row: Whether to return the attention of the first token.

        Returns:
            (B, T, C), and if asked for the attention of the first token to all, mean over heads:
            (B, T), float32 also under autocast.
        """
        query, key, value = self._projections(x, keys, context)
        row = first_attention(query, key, self.num_heads) if first_row else None
        return self.attend(query, key, value), row

    def kept_share(self, x: Tensor, mask: Tensor) -> Tensor:
        """Share of each token's attention that goes to active tokens.

        Args:
            x: (B, N, C), all tokens, normalised.
            mask: (B, N), or (B, N, V) for V masks at once; 1 for active tokens.

        Returns:
            Of the shape of ``mask``.
        """
        query, key = self.project(x, 0, 2).chunk(2, dim=-1)
        return kept_share(query, key, mask, self.scale / self.num_heads)

    def first_query(self, x: Tensor, with_keys: bool) -> tuple[Tensor, Tensor | None]:
        """Mean over heads of the first token's query times the key of each: (B, N), and the keys.

        Without keys the key projection is folded with the query, for N * C instead of N * C ** 2
        multiply-adds.

        Args:
            x: (B, N, C), all tokens, normalised.
            with_keys: Whether to compute the keys (B, N, C) of all tokens.
        """
        query = self.project(x[:, 0], 0, 1) / self.num_heads
        if with_keys:
            keys = self.project(x, 1, 2)
            return (keys @ query[..., None]).squeeze(-1), keys
        part = slice(self.embed_dims, 2 * self.embed_dims)
        scores = (x @ (query @ self.attn.in_proj_weight[part])[..., None]).squeeze(-1)
        bias = self.attn.in_proj_bias
        return scores if bias is None else scores + (query @ bias[part])[:, None], None

    def _projections(
        self, x: Tensor, keys: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if keys is not None:
            query = self.project(x, 0, 1)
            value = self.project(x if context is None else context, 2, 3)
            return query, keys.to(query.dtype), value
        if context is not None:
            key, value = self.project(context, 1, 3).chunk(2, dim=-1)
            return self.project(x, 0, 1), key, value
        query, key, value = self.project(x, 0, 3).chunk(3, dim=-1)
        return query, key, value


def first_attention(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """Attention of the first of queries and keys (B, T, C), mean over heads: (B, T)."""
    with full_precision(query.device.type):
        exact = torch.promote_types(query.dtype, torch.float32)
        query, key = split_heads(query[:, :1].to(exact), num_heads), split_heads(key, num_heads)
        logits = query @ key.to(exact).transpose(-1, -2) * query.shape[-1] ** -0.5
        return logits.softmax(dim=-1).mean(dim=1).squeeze(1)
