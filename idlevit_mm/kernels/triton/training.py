"""Operators that have gradients: attention in windows, and rows taken out of a map and put back.

They write to nothing that they are given, so that a block may be recomputed.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, C channels, A
heads, D = C / A, M windows, L slots of a window, P parts of a sum.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ...ops import Rows
from ..operators import operator
from ..slots import WindowCore
from . import gradients, ops, windows
from .ops import _layout, _Maybe, _on, _or, size

_DEPTHS = 16, 32, 64, 128
# Side of the tiles of pairs of slots, and programs that add up such tiles: enough for all
# multiprocessors of a GPU, and what they have found is read once more.
_PAIRS, _PROGRAMS = 32, 1024


# Rows


def _gathered(x: Tensor, ids: Tensor, places: _Maybe) -> Tensor:
    return x.new_empty(*ids.shape, x.shape[2])


def _gather_traffic(x: Tensor, ids: Tensor, places: _Maybe) -> tuple[int, int]:
    out = ids.numel() * x.shape[2] * x.element_size()
    return size(ids) + out, out


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _gather_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    ids, places = ctx.saved_tensors
    return join_rows(places, ids, None, grad.contiguous()), None, None


@operator(_gathered, _gather_traffic, gradient=(_keep_places, _gather_back))
def gather_rows(x: Tensor, ids: Tensor, places: _Maybe) -> Tensor:
    """Rows (B, K) of x (B, N, C); for a gradient the packed row of each token (B, N) is needed."""
    return ops.take_norm(x, ids, None, None, None, 0.0)


def _joined(places: Tensor, ids: Tensor, x: _Maybe, rows: _Maybe) -> Tensor:
    some = _or(x, rows)
    return some.new_empty(*places.shape, some.shape[2])


def _join_traffic(places: Tensor, ids: Tensor, x: _Maybe, rows: _Maybe) -> tuple[int, int]:
    some = _or(x, rows)
    row = some.shape[2] * some.element_size()
    idle, active = places.numel() - ids.numel(), ids.numel()
    read = (idle if x is not None else 0) + (active if rows is not None else 0)
    return size(places) + read * row, places.numel() * row


def _keep_ids(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _join_back(ctx: Any, grad: Tensor) -> tuple[_Maybe, ...]:
    (places, ids), grad = ctx.saved_tensors, grad.contiguous()
    _, _, of_map, of_rows = ctx.needs_input_grad
    return (
        None,
        None,
        join_rows(places, ids, grad, None) if of_map else None,
        gather_rows(grad, ids, places) if of_rows else None,
    )


@operator(_joined, _join_traffic, gradient=(_keep_ids, _join_back))
def join_rows(places: Tensor, ids: Tensor, x: _Maybe, rows: _Maybe) -> Tensor:
    """A map of packed rows (B, K, C) in their places and of x (B, N, C) elsewhere; None is zeros.

    ``places`` (B, N) says which packed row each token is, -1 for none, ``ids`` (B, K) the reverse.
    """
    return ops.put(x, places, rows, None, _joined(places, ids, x, rows))


# Attention


def _attended(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, count, width = qkv.shape
    sums = qkv.new_empty(batch, count, args[7], dtype=torch.float32)
    return qkv.new_empty(batch, count, width // 3), sums


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ids, offsets, pairs, blank, *ctx.sizes, places = inputs
    ctx.mark_non_differentiable(output[1])
    # Nor is a gradient of zeros to be made for it.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, ids, offsets, pairs, blank, places, *output)


def _attend_back(ctx: Any, grad: Tensor, _: _Maybe) -> tuple[_Maybe, ...]:
    *given, places, out, sums = ctx.saved_tensors
    found = out, sums, grad.contiguous(), ctx.needs_input_grad[3]
    grads = attend_packed_windows_backward(*given, *ctx.sizes, places, *found)
    of_pairs, of_blank = (
        part.sum(0).to(like.dtype) if len(part) else torch.zeros_like(like)
        for part, like in zip(grads[1:], given[3:], strict=True)
    )
    return grads[0], None, None, of_pairs, of_blank, *(None,) * 7


@operator(_attended, flops=ops._attention_flops, gradient=(_keep_attention, _attend_back))
def attend_packed_windows(
    qkv: Tensor,
    ids: _Maybe,
    offsets: _Maybe,
    pairs: Tensor,
    blank: Tensor,
    hw_shape: list[int],
    window: int,
    shift: int,
    num_heads: int,
    scale: float,
    padded: bool,
    places: _Maybe,
) -> tuple[Tensor, Tensor]:
    """``window_attention`` by biases of pairs of slots (A, L, L): (B, K, C).

    And the logarithms of the sums of weights (B, K, A). Where it is padded, padding is a key.
    """
    out, sums = _attended(qkv, ids, offsets, pairs, blank, hw_shape, window, shift, num_heads)
    *sides, number = _layout(hw_shape, window)
    with _on(qkv):
        windows.attention_kernel[(len(qkv) * number * num_heads,)](
            *(qkv, _or(ids, qkv), _or(offsets, qkv), pairs, blank, out, sums),
            *(*hw_shape, *sides, number, scale),
            **ops.window_constants(qkv, ids, window, shift, num_heads, padded),
            # Else registers of dense windows of 12 would be spilled on sm_90.
            **dict(TRAINS=True, BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=3 - (ids is None)),
        )
    return out, sums


def _slopes(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients: none for parts that are zero."""
    _, _, pairs, blank, hw_shape, window, _, heads, _, padded = args[:10]
    number = len(qkv) * _layout(hw_shape, window)[2]
    parts = min(number, triton.cdiv(_PROGRAMS, heads * triton.cdiv(window**2, _PAIRS) ** 2))
    return (
        torch.empty_like(qkv),
        qkv.new_empty(parts * args[-1], *pairs.shape, dtype=torch.float32),
        qkv.new_empty(number * padded, len(blank), dtype=torch.float32),
    )


def _slope_traffic(qkv: Tensor, *args: Any) -> tuple[int, int]:
    *given, biased = args
    tensors = [x for x in given if isinstance(x, Tensor)]
    out, sums, grad = tensors[-3:]
    # Pairs are walked through once more, by means that are written in between.
    again = size(qkv, grad, sums, sums) if biased else 0
    return size(qkv, *tensors) + again, size(*_slopes(qkv, *args), sums)


def _slope_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * ops._attention_flops(*args, **kwargs)


@operator(_slopes, _slope_traffic, flops=_slope_flops)
def attend_packed_windows_backward(
    qkv: Tensor,
    ids: _Maybe,
    offsets: _Maybe,
    pairs: Tensor,
    blank: Tensor,
    hw_shape: list[int],
    window: int,
    shift: int,
    num_heads: int,
    scale: float,
    padded: bool,
    places: _Maybe,
    out: Tensor,
    sums: Tensor,
    grad: Tensor,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, and in parts that are to be added up of pairs (P, A, L, L) and of blank.

    There are no parts where biases are not ``biased`` to have any, and where nothing is padded.
    """
    sizes = hw_shape, window, shift, num_heads, scale, padded
    found = _slopes(qkv, ids, offsets, pairs, blank, *sizes, biased)
    *sides, number = _layout(hw_shape, window)
    constants, means = (
        ops.window_constants(qkv, ids, window, shift, num_heads, padded),
        torch.empty_like(sums),
    )
    total = len(qkv) * number
    with _on(qkv):
        gradients.rows_gradient_kernel[(total * num_heads,)](
            *(qkv, _or(ids, qkv), _or(offsets, qkv), pairs, blank, out, sums, grad),
            *(found[0], found[2], means, *hw_shape, *sides, number, scale),
            **dict(constants, BLOCK=16, num_warps=max(constants['D'] // 32, 1), num_stages=2),
        )
        if biased:
            tiles = triton.cdiv(window**2, _PAIRS) ** 2
            gradients.pairs_gradient_kernel[(num_heads, tiles, len(found[1]))](
                *(qkv, _or(places, qkv), pairs, blank, sums, means, grad, found[1]),
                *(*hw_shape, *sides, number, total, scale),
                **dict(constants, SLOTS=_PAIRS, num_warps=4, num_stages=1),
            )
    return found


def attends(qkv: Tensor, core: WindowCore, rows: Rows | None) -> bool:
    """Whether the kernels compute attention of (B, T, 3 * C): without summaries, dropout, ..."""
    packed = rows is None or (rows.offsets is not None and rows.places is not None)
    plain = not core.dropout and core.drop is None and core.pairs is None and core.apart is None
    # Layers may be left out of autocast.
    half = qkv.dtype.itemsize == 2 or ops.INTERPRETED
    return packed and plain and half and qkv.shape[2] // 3 // core.num_heads in _DEPTHS


def attend_windows(
    qkv: Tensor, core: WindowCore, hw_shape: tuple[int, int], shift_size: int, rows: Rows | None
) -> Tensor:
    """``Reference.attend_windows`` where it ``attends``."""
    ids, offsets, places = (None,) * 3 if rows is None else (rows.ids, rows.offsets, rows.places)
    padded = not core.hides_padding and any(side % core.window_size for side in hw_shape)
    sizes = list(hw_shape), core.window_size, shift_size, core.num_heads, core.scale, padded
    tensors = qkv.contiguous(), ids, offsets, core.bias[0].contiguous(), core.blank.contiguous()
    return attend_packed_windows(*tensors, *sizes, places)[0]
