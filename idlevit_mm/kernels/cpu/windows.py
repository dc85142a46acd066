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

from ..slots import WindowCore, hidden_logit
from .packing import Bucket, WindowPacking

# Attention weights of one head that are held at a time: they stay in the cache.
_CHUNK = 2**18


def attend_squeezed(qkv: Tensor, core: WindowCore, packing: WindowPacking) -> Tensor:
    """Attention within the windows of a packing: (B, R, 3 * C) to (B, R, C), without dropout.

    Rows that have no place are zero; summaries have no position bias.
    """
    core = core.to(qkv.dtype)
    # A row and a column for summaries, and one for empty places, which are hidden as keys.
    table = F.pad(core.bias[0], (0, 1, 0, 2))
    table = F.pad(table, (0, 1), value=hidden_logit(table.dtype))
    rows = qkv.flatten(0, 1)
    out = _Attend.apply(rows, core.blank, table, packing, core.num_heads, core.scale)
    return out.unflatten(0, qkv.shape[:2])


class _Attend(torch.autograd.Function):
    """Softmax attention that keeps queries, keys and values and recomputes the weights.

    Windows are taken from the packed rows a few at a time, and computed head by head: neither the
    squeezed windows nor the weights, the largest tensors of a training step, are there as a whole.
    """

    @staticmethod
    def forward(
        qkv: Tensor,
        blank: Tensor,
        table: Tensor,
        packing: WindowPacking,
        num_heads: int,
        scale: float,
    ) -> Tensor:
        # The last row takes what belongs to no packed row.
        out = qkv.new_zeros(len(qkv) + 1, qkv.shape[1] // 3)
        for chunk in _chunks(packing):
            rows = _of(packing.rows, chunk).flatten()
            placed = _place(qkv, blank, rows, packing)
            query, key, value = _heads(placed, chunk, 3 * num_heads).chunk(3)
            target = qkv.new_empty(len(rows), out.shape[1])
            mask = _mask(table, packing, chunk)
            for heads in _head_groups(num_heads, chunk):
                weights = _weights(mask[heads], query[heads], key[heads], scale)
                _heads(target, chunk, num_heads)[heads] = weights @ value[heads]
            out.index_copy_(0, rows.clamp(max=len(qkv)), target)
        return out[:-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qkv, blank, table, ctx.packing, ctx.num_heads, ctx.scale = inputs
        ctx.save_for_backward(qkv, blank, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, blank, table = ctx.saved_tensors
        num_heads, scale, packing = ctx.num_heads, ctx.scale, ctx.packing
        grad_qkv = qkv.new_zeros(len(qkv) + 1, qkv.shape[1])
        grad_blank, grad_table = torch.zeros_like(blank), torch.zeros_like(table)
        nothing = grad.new_zeros(grad.shape[1])
        for chunk in _chunks(packing):
            rows = _of(packing.rows, chunk).flatten()
            placed = _place(qkv, blank, rows, packing)
            grad_placed = torch.empty_like(placed)
            query, key, value = _heads(placed, chunk, 3 * num_heads).chunk(3)
            grad_query, grad_key, grad_value = _heads(grad_placed, chunk, 3 * num_heads).chunk(3)
            grad_out = _heads(_fill(grad, nothing, rows), chunk, num_heads)
            mask = _mask(table, packing, chunk)
            for heads in _head_groups(num_heads, chunk):
                weights = _weights(mask[heads], query[heads], key[heads], scale)
                grad_value[heads] = weights.transpose(2, 3) @ grad_out[heads]
                grad_weights = grad_out[heads] @ value[heads].transpose(2, 3)
                logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_query[heads] = (logits @ key[heads]).mul_(scale)
                grad_key[heads] = (logits.transpose(2, 3) @ query[heads]).mul_(scale)
                _add_pairs(grad_table[heads], logits, packing, chunk)
            grad_qkv.index_copy_(0, rows.clamp(max=len(qkv)), grad_placed)
            if packing.has_padding:
                grad_blank += grad_placed[rows == len(qkv)].sum(0)
        return grad_qkv[:-1], grad_blank, grad_table, None, None, None


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


def _head_groups(num_heads: int, chunk: Bucket) -> Iterator[slice]:
    """Heads that are computed together: one where windows are many, more where they are few."""
    most = max(_CHUNK // (chunk.num_windows * chunk.width**2), 1)
    for first in range(0, num_heads, most):
        yield slice(first, min(first + most, num_heads))


def _of(places: Tensor, chunk: Bucket) -> Tensor:
    """What is known of the places of a chunk: (n, w) of (P,)."""
    number, width = chunk.num_windows, chunk.width
    return places[chunk.first : chunk.first + number * width].view(number, width)


def _place(qkv: Tensor, blank: Tensor, rows: Tensor, packing: WindowPacking) -> Tensor:
    """Packed rows in their places: (n * w, 3 * C); any row in empty places, hidden as a key."""
    if not packing.has_padding:
        return qkv.index_select(0, rows.clamp(max=len(qkv) - 1))
    return _fill(qkv, blank, rows)


def _fill(values: Tensor, blank: Tensor, rows: Tensor) -> Tensor:
    """Rows of values (R, C), and blank (C,) where there is none: (n * w, C)."""
    filled = values.index_select(0, rows.clamp(max=len(values) - 1))
    (without,) = (rows >= len(values)).nonzero(as_tuple=True)
    return filled.index_copy_(0, without, blank.expand(len(without), -1))


def _heads(rows: Tensor, chunk: Bucket, parts: int) -> Tensor:
    """Rows (n * w, C) of the windows of a chunk, head by head: (parts, n, w, D), a view."""
    return rows.view(chunk.num_windows, chunk.width, parts, -1).movedim(2, 0)


def _mask(table: Tensor, packing: WindowPacking, chunk: Bucket) -> Tensor:
    """What is added to the logits: (A, n, w, w), or (A, 1, w, w) where all windows are alike."""
    width, side = chunk.width, table.shape[-1]
    if chunk.complete:
        mask = table[:, None, :width, :width]
    else:
        slots = _of(packing.slots, chunk)
        pairs = slots[:, :, None] * side + slots[:, None, :]
        mask = table.flatten(1).index_select(1, pairs.flatten()).unflatten(1, pairs.shape)
    if chunk.num_border:
        regions = _of(packing.regions, chunk)
        one, other = regions[:, :, None], regions[:, None, :]
        apart = (one != other) & (one >= 0) & (other >= 0)
        mask = mask.masked_fill(apart, hidden_logit(table.dtype))
    return mask


def _weights(mask: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Weights (G, n, w, w) of some heads G: mask (G, n or 1, w, w), query and key (G, n, w, D)."""
    shape = *query.shape[:3], query.shape[2]
    mask = mask.expand(shape).flatten(0, 1)
    keys = key.flatten(0, 1).transpose(1, 2)
    logits = torch.baddbmm(mask, query.flatten(0, 1), keys, alpha=scale)
    return logits.view(shape).softmax(dim=-1)


def _add_pairs(
    grad_table: Tensor, grad_logits: Tensor, packing: WindowPacking, chunk: Bucket
) -> None:
    """Add gradients of logits (G, n, w, w) to those of their slot pairs (G, L + 2, L + 2)."""
    if chunk.complete:
        grad_table[:, : chunk.width, : chunk.width] += grad_logits.sum(1)
        return
    # Two products with slots as unit vectors: adding by index is slower and not deterministic.
    slots = _of(packing.slots, chunk)
    units = grad_logits.new_zeros(*slots.shape, grad_table.shape[2])
    units.scatter_(2, slots[..., None], 1.0)
    by_key = (grad_logits @ units).flatten(1, 2)
    grad_table += units.flatten(0, 1).t() @ by_key
