"""What the kinds of attention share.

Shape letters: B images, N tokens of the map (H * W), T active tokens, K keys, C channels, A heads.
"""

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import Tensor, nn

from ..errors import SettingError
from ..kernels import backend_at, exact, full_precision, is_plain, split_heads
from ..ops import Extent, mean_inside


class Projections:
    """Queries, keys and values by one layer, or parts of them by its weights alone."""

    num_heads: int
    scale: float
    qkv: nn.Module
    # Whether logits are products of queries and keys, so that layers fold into one another.
    folds: bool = True

    def weights(self) -> tuple[Tensor, Tensor | None] | None:
        """Those of queries, keys and values: (3 * C, C), and (3 * C,) or None.

        None in place of both where ``qkv`` is to be called.
        """
        raise NotImplementedError

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Queries (0), keys (1) and values (2) from ``first`` up to ``last``, one after another."""
        part = slice(first * x.shape[-1], last * x.shape[-1])
        weights = self.weights()
        if weights is None:
            return self.called(x)[..., part]
        weight, bias = weights
        return backend_at(x).product(x, weight[part], None if bias is None else bias[part])

    def called(self, x: Tensor) -> Tensor:
        """Queries, keys and values by the layer as a module: (..., C) to (..., 3 * C)."""
        return self.qkv(x)

    def mean_query_attention(
        self, x: Tensor, hw_shape: tuple[int, int], extent: Extent | None = None
    ) -> Tensor:
        """Attention of the mean of the tokens x (B, N, C) to each of them: (B, A, N).

        Padding of images is no part of the mean, and gets nothing.

        The key projection is folded into the query, so that it costs N * C * A instead of N * C **
        2; the key bias adds the same to all tokens of a head and drops out of the softmax.
        """
        weights, mean = self.weights(), mean_inside(x, hw_shape, extent)
        if weights is None or not self.folds:
            query = split_heads(self.project(mean, 0, 1), self.num_heads)
            keys = split_heads(self.project(x, 1, 2), self.num_heads)
            return _softmax((query * self.scale @ keys.transpose(-1, -2)).squeeze(2), extent)
        channels, weight, bias = x.shape[-1], weights[0].to(x.dtype), weights[1]
        bias = None if bias is None else bias[:channels].to(x.dtype)
        query = F.linear(mean.squeeze(1), weight[:channels], bias)
        query = query.unflatten(-1, (self.num_heads, -1)) * self.scale
        keys = weight[channels : 2 * channels].unflatten(0, (self.num_heads, -1))
        folded = torch.einsum('bad,adc->bac', query, keys)
        return _softmax(folded @ x.transpose(1, 2), extent)


def _softmax(logits: Tensor, extent: Extent | None) -> Tensor:
    """Softmax of (B, A, N) over the tokens that belong to their images; 0 for the others."""
    if extent is not None:
        logits = logits.masked_fill(~extent.inside[:, None], float('-inf'))
    return logits.softmax(dim=-1)


def row_attention(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """Attention of one query (B, 1, C) to keys (B, K, C), mean over heads: (B, K).

    It is float32 also under autocast.
    """
    with full_precision(query):
        query, key = split_heads(exact(query), num_heads), split_heads(exact(key), num_heads)
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return logits.softmax(dim=-1).mean(dim=1).squeeze(1)


class PackedAttention(Projections, MultiheadAttention):
    """Plain multi-head attention under mmcv's names, for packed tokens.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
        drop_path_rate: Stochastic depth of the branch.
        qkv_bias: Whether query, key, value and output have a bias.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(
            embed_dims,
            num_heads,
            attn_drop,
            proj_drop,
            dropout_layer=dict(type='DropPath', drop_prob=drop_path_rate),
            batch_first=True,
            bias=qkv_bias,
        )
        self.scale = (embed_dims // num_heads) ** -0.5

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """As in ``Projections``; also of an ``attn`` that is called as a module.

        Raises:
            SettingError: ``attn`` has been replaced by something without them.
        """
        weight = getattr(self.attn, 'in_proj_weight', None)
        if not isinstance(weight, Tensor):
            raise SettingError(
                f'attn.attn is a {type(self.attn).__name__} without in_proj_weight, which scores '
                'by queries and keys need; allowed: another scorer, or nn.MultiheadAttention'
            )
        return weight, self.attn.in_proj_bias

    def branch(
        self,
        x: Tensor,
        context: Tensor | None = None,
        keys: Tensor | None = None,
        ask: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the branch, without the identity.

        Args:
            x: (B, T, C), normalised tokens that attend.
            context: (B, K, C), normalised tokens that serve as keys and values; None for x.
            keys: (B, K, C), the keys if they are known already.
            ask: A place in x whose attention to all keys is wanted.

        Returns:
            (B, T, C), and the attention that was asked for, mean over heads: (B, K).
        """
        if is_plain(self.attn, nn.MultiheadAttention):
            query, key, value = self._projections(x, context, keys)
            row = None
            if ask is not None:
                row = row_attention(query[:, ask : ask + 1], key, self.num_heads)
            dropout = self.attn.dropout if self.training else 0.0
            backend = backend_at(x)
            out = backend.attend(query, key, value, self.num_heads, dropout)
            out = backend.linear(out, self.attn.out_proj)
        else:
            out, row = self._called(x, x if context is None else context, ask)
        return self.dropout_layer(self.proj_drop(out)), row

    def _projections(
        self, x: Tensor, context: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if keys is None and context is None:
            query, key, value = self.project(x, 0, 3).chunk(3, dim=-1)
            return query, key, value
        query, context = self.project(x, 0, 1), x if context is None else context
        if keys is not None:
            return query, keys.to(query.dtype), self.project(context, 2, 3)
        key, value = self.project(context, 1, 3).chunk(2, dim=-1)
        return query, key, value

    def _called(self, x: Tensor, context: Tensor, ask: int | None) -> tuple[Tensor, Tensor | None]:
        """Attention by the module, as mmcv calls it: tokens first, then images."""
        x, context = x.transpose(0, 1), context.transpose(0, 1)
        out, weights = self.attn(x, context, context, need_weights=ask is not None)
        return out.transpose(0, 1), None if ask is None else weights[:, ask]
