"""Attention within squeezed windows, head by head, with nothing stored for the backward pass.

Shape letters: P places, n windows of one bucket, w places of a window, L slots of a window, C
channels, A heads, D channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import Bucket, WindowPacking

# Attention weights of one head that are held at a time: they stay in the cache.
_CHUNK = 2**18


def attend_squeezed(
    qkv: Tensor, bias: Tensor, packing: WindowPacking, num_heads: int, scale: float
) -> Tensor:
    """Attention within the windows of a packing.

    Args:
        qkv: (P, 3 * C), queries, keys and values in their places.
        bias: (A, L, L), added to the logits of slot pairs; summaries have none.
        packing: The windows.
        num_heads: A.
        scale: Factor of the logits.

    Returns:
        (P, C); of empty places any values.
    """
    # A row and a column for summaries, and one for empty places, which are hidden as keys.
    table = F.pad(F.pad(bias, (0, 1, 0, 2)), (0, 1), value=torch.finfo(bias.dtype).min / 4)
    return _Attend.apply(qkv, table, packing, num_heads, scale)


class _Attend(torch.autograd.Function):
    """Softmax attention that keeps queries, keys and values and recomputes the weights.

    On the CPU the small products of windows are faster head by head on strided views than in one
    fused call, and the weights of all windows would be the largest tensors of a training step.
    """

    @staticmethod
    def forward(
        qkv: Tensor, table: Tensor, packing: WindowPacking, num_heads: int, scale: float
    ) -> Tensor:
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        for chunk in _chunks(packing):
            query, key, value = _heads(qkv, chunk, 3 * num_heads).chunk(3)
            target = _heads(out, chunk, num_heads)
            mask = _mask(table, packing, chunk)
            for head in range(num_heads):
                weights = _weights(mask[head], query[head], key[head], scale)
                target[head].copy_(torch.bmm(weights, value[head]))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qkv, table, ctx.packing, ctx.num_heads, ctx.scale = inputs
        ctx.save_for_backward(qkv, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table = ctx.saved_tensors
        num_heads, scale, packing = ctx.num_heads, ctx.scale, ctx.packing
        grad_qkv, grad_table = torch.empty_like(qkv), torch.zeros_like(table)
        grad = grad.contiguous()
        for chunk in _chunks(packing):
            query, key, value = _heads(qkv, chunk, 3 * num_heads).chunk(3)
            grad_query, grad_key, grad_value = _heads(grad_qkv, chunk, 3 * num_heads).chunk(3)
            grad_out = _heads(grad, chunk, num_heads)
            mask = _mask(table, packing, chunk)
            for head in range(num_heads):
                weights = _weights(mask[head], query[head], key[head], scale)
                grad_value[head].copy_(torch.bmm(weights.transpose(1, 2), grad_out[head]))
                grad_weights = torch.bmm(grad_out[head], value[head].transpose(1, 2))
                logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_query[head].copy_(torch.bmm(logits, key[head]).mul_(scale))
                grad_key[head].copy_(torch.bmm(logits.transpose(1, 2), query[head]).mul_(scale))
                _add_pairs(grad_table[head], logits, packing, chunk)
        return grad_qkv, grad_table, None, None, None


def _chunks(packing: WindowPacking) -> Iterator[Bucket]:
    """Buckets in pieces, of which each has border windows alone or none."""
    for bucket in packing.buckets:
        most = max(_CHUNK // bucket.width**2, 1)
        inner = bucket.num_windows - bucket.num_border
        for border, begin, end in ((False, 0, inner), (True, inner, bucket.num_windows)):
            for window in range(begin, end, most):
                number = min(most, end - window)
                yield bucket._replace(
                    first=bucket.first + window * bucket.width,
                    num_windows=number,
                    num_border=number if border else 0,
                )


def _heads(rows: Tensor, chunk: Bucket, parts: int) -> Tensor:
    """Rows (P, C) of the windows of a chunk, head by head: (parts, n, w, D), a view."""
    number, width = chunk.num_windows, chunk.width
    return (
        rows[chunk.first : chunk.first + number * width]
        .view(number, width, parts, -1)
        .movedim(2, 0)
    )


def _slots(packing: WindowPacking, chunk: Bucket, name: str) -> Tensor:
    number, width = chunk.num_windows, chunk.width
    return getattr(packing, name)[chunk.first : chunk.first + number * width].view(number, width)


def _mask(table: Tensor, packing: WindowPacking, chunk: Bucket) -> Tensor:
    """What is added to the logits: (A, n, w, w), or (A, 1, w, w) where all windows are alike."""
    width, side = chunk.width, table.shape[-1]
    if chunk.complete:
        mask = table[:, None, :width, :width]
    else:
        slots = _slots(packing, chunk, 'slots')
        pairs = slots[:, :, None] * side + slots[:, None, :]
        mask = table.flatten(1).index_select(1, pairs.flatten()).unflatten(1, pairs.shape)
    if chunk.num_border:
        regions = _slots(packing, chunk, 'regions')
        one, other = regions[:, :, None], regions[:, None, :]
        apart = (one != other) & (one >= 0) & (other >= 0)
        mask = mask.masked_fill(apart, torch.finfo(table.dtype).min / 4)
    return mask


def _weights(mask: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention weights of one head: mask (n or 1, w, w), query and key (n, w, D)."""
    mask = mask.expand(len(query), -1, -1)
    return torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale).softmax(dim=-1)


def _add_pairs(
    grad_table: Tensor, grad_logits: Tensor, packing: WindowPacking, chunk: Bucket
) -> None:
    """Add the gradients of logits (n, w, w) to those of their slot pairs."""
    if chunk.complete:
        grad_table[: chunk.width, : chunk.width] += grad_logits.sum(0)
        return
    # Two products with slots as unit vectors: adding by index is slower and not deterministic.
    slots = _slots(packing, chunk, 'slots')
    units = grad_logits.new_zeros(*slots.shape, len(grad_table)).scatter_(2, slots[..., None], 1.0)
    by_key = torch.bmm(grad_logits, units)
    grad_table += units.flatten(0, 1).t() @ by_key.flatten(0, 1)
