"""What the kinds of attention share.

Shape letters: B images, N tokens of the map (H * W), T active tokens, K keys, C channels, A heads,
D channels of a head.
"""

from functools import partial

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import Tensor

from ..ops import autocasts, eager_on_cpu, in_chunks
from .linear import linear

# Pairs of a query and a key of one head, below which launching many operations costs more.
_MIN_PAIRS = 2**18


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) to (B, A, T, D)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def mean_query_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, scale: float
) -> Tensor:
    """Softmax over tokens of the logits between the mean token's query and every token's key.

    The key projection is folded into the query, so that it costs N * C * A instead of N * C ** 2;
    the key bias adds the same to all tokens of a head and drops out of the softmax.

    Args:
        x: (B, N, C), normalised tokens.
        qkv_weight: (3 * C, C), of which queries and keys are used.
        qkv_bias: (3 * C,) or None.
        num_heads: A.
        scale: Factor of the logits.

    Returns:
        (B, A, N), each row sums to 1.
    """
    channels = x.shape[-1]
    weight = qkv_weight.to(x.dtype)
    bias = None if qkv_bias is None else qkv_bias[:channels].to(x.dtype)
    query = F.linear(x.mean(dim=1), weight[:channels], bias).unflatten(-1, (num_heads, -1))
    keys = weight[channels : 2 * channels].unflatten(0, (num_heads, -1))
    folded = torch.einsum('bad,adc->bac', query * scale, keys)
    return (folded @ x.transpose(1, 2)).softmax(dim=-1)


def head_by_head_pays(query: Tensor, key: Tensor) -> bool:
    """Whether ``attend_head_by_head`` is the faster way for (B, T, C) and (B, K, C)."""
    return (
        query.shape[1] * key.shape[1] >= _MIN_PAIRS
        and query.dtype == key.dtype == torch.float32
        and not torch.is_grad_enabled()
        and eager_on_cpu(query)
        and not autocasts('cpu')
    )


def attend_head_by_head(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Softmax attention as linear layers whose weights are keys and values, on the CPU.

    PyTorch's fused attention gives its products to MKL; see ``linear``.

    Args:
        query: (B, T, C).
        key: (B, K, C).
        value: (B, K, C).
        num_heads: A.

    Returns:
        (B, T, C).
    """
    out = torch.empty_like(query)
    scale = (query.shape[2] // num_heads) ** -0.5
    for image in range(len(query)):
        parts = (part[image].chunk(num_heads, dim=1) for part in (query, key, value, out))
        for queries, keys, values, target in zip(*parts, strict=True):
            attend = partial(_weigh, keys=keys * scale, values=values.t().contiguous())
            target.copy_(in_chunks(attend, queries[None], len(keys))[0])
    return out


def _weigh(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one head: queries (1, T, D), scaled keys (K, D), values (D, K)."""
    return linear(linear(queries, keys).softmax(dim=-1), values)


class PackedAttention(MultiheadAttention):
    """Parameters of plain multi-head attention, under mmcv's names, for packed tokens.

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

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Queries (0), keys (1) and values (2) from ``first`` up to ``last``, one after another."""
        channels = self.embed_dims
        part = slice(first * channels, last * channels)
        bias = self.attn.in_proj_bias
        return linear(x, self.attn.in_proj_weight[part], None if bias is None else bias[part])

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The branch of projected queries (B, T, C), keys and values (B, K, C): (B, T, C)."""
        if not self.training and head_by_head_pays(query, key):
            out = attend_head_by_head(query, key, value, self.num_heads)
        else:
            query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
            dropout = self.attn.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
            out = out.transpose(1, 2).flatten(2)
        projection = self.attn.out_proj
        out = linear(out, projection.weight, projection.bias)
        return self.dropout_layer(self.proj_drop(out))

    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean of the tokens x (B, N, C) to each of them: (B, A, N)."""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        return mean_query_attention(x, weight, bias, self.num_heads, self.scale)
