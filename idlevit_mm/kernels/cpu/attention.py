"""Softmax attention as linear layers whose weights are keys and values.

PyTorch's fused attention gives its products to MKL; see ``linear``.

Shape letters: B images, T queries, K keys, C channels, D channels of a head.
"""

from functools import partial

import torch
from torch import Tensor

from ..site import autocasts
from .linear import product
from .pieces import in_pieces

# Pairs of a query and a key of one head, below which launching many operations costs more.
_MIN_PAIRS = 2**16


def pays(query: Tensor, key: Tensor) -> bool:
    """Whether ``attend`` is the faster way for (B, T, C) and (B, K, C)."""
    return (
        query.shape[1] * key.shape[1] >= _MIN_PAIRS
        and query.dtype == key.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not autocasts('cpu')
    )


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Attention of queries (B, T, C) to keys and values (B, K, C), head by head: (B, T, C)."""
    out = torch.empty_like(query)
    scale = (query.shape[2] // num_heads) ** -0.5
    for image in range(len(query)):
        parts = (part[image].chunk(num_heads, dim=1) for part in (query, key, value, out))
        for queries, keys, values, target in zip(*parts, strict=True):
            weigh = partial(_weigh, keys=keys * scale, values=values.t().contiguous())
            target.copy_(in_pieces(weigh, queries[None], len(keys))[0])
    return out


def _weigh(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one head: queries (1, T, D), scaled keys (K, D), values (D, K)."""
    return product(product(queries, keys).softmax(dim=-1), values)
