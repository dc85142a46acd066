"""Operators of whole layers: products with what surrounds them, and spatial reduction.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, C channels, O
channels out, S side of a cell.
"""

from math import prod
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor

from ..operators import operator
from . import ops, products, reductions
from .ops import _on, _or, put, size

_Maybe: TypeAlias = Tensor | None
# What the kernels are compiled with, so that nothing spills; see tests/test_kernels.
_WARPS = 4
MLP_TILES = dict(BLOCK_M=64, BLOCK_H=64, num_warps=4)
CELL_TILES = dict(BLOCK=16, num_warps=4)
# Programs from which on a GPU is busy: those of fewer rows share the columns of a layer.
_BUSY = 256


def norm_tiles(channels: int) -> dict[str, int]:
    """Of the product of the norm of rows, which are kept whole."""
    tiles = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
    return dict(tiles, C=channels, P=triton.next_power_of_2(channels))


def product_tiles(channels: int, gelu: bool) -> dict[str, int]:
    """Of another product: near the fastest of eight that were timed on an H100."""
    if gelu:
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8)
    return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64 if channels > 384 else 32, num_warps=4)


def _applied(
    x: Tensor, ids: _Maybe, scale: _Maybe, shift: _Maybe, eps: float, weight: _Maybe, *_: object
) -> Tensor:
    width = x.shape[2] if weight is None else len(weight)
    return x.new_empty(*(x if ids is None else ids).shape[:2], width)


def _linear_traffic(x: Tensor, ids: _Maybe, *args: Any) -> tuple[int, int]:
    out = _applied(x, ids, *args)
    parts = [arg for arg in args if isinstance(arg, Tensor)]
    return _row_bytes(x, ids) + size(ids, *parts), size(out)


def _row_bytes(x: Tensor, ids: _Maybe) -> int:
    """Bytes of those rows of x (B, N, C) that ids are of; of all where there are none."""
    return size(x) if ids is None else ids.numel() * size(x[0, 0])


def _linear_flops(x: Tensor, *args: Any, **_: object) -> int:
    return 0 if args[4] is None else 2 * _applied(x, *args).numel() * x.shape[2]


@operator(_applied, _linear_traffic, flops=_linear_flops)
def linear(
    x: Tensor,
    ids: _Maybe,
    scale: _Maybe,
    shift: _Maybe,
    eps: float,
    weight: _Maybe,
    bias: _Maybe,
    gelu: bool,
) -> Tensor:
    """A linear layer of rows (B, K) of x (B, N, C), all where there are no ids: (B, K, O).

    Of their LayerNorm where there are its scale and shift (C,); GELU of it, if that is wanted.
    Without a weight the rows or their norm (B, K, C).
    """
    if weight is None:
        return ops.take_norm(x, ids, None, scale, shift, eps)
    out = _applied(x, ids, scale, shift, eps, weight)
    if scale is None or shift is None:
        _multiply(x, ids, 'x', weight, bias, None, out, gelu)
    else:
        _multiply_norm(x, ids, (scale, shift, eps), weight, bias, out, gelu)
    return out


def _multiply_norm(
    x: Tensor,
    ids: _Maybe,
    norm: tuple[Tensor, Tensor, float],
    weight: Tensor,
    bias: _Maybe,
    out: Tensor,
    gelu: bool,
) -> None:
    """Launch a product of the LayerNorm of rows of x (B, N, C) that ids name, or of all."""
    x, (scale, shift, eps), (outputs, channels) = x.contiguous(), norm, weight.shape
    assert channels == x.shape[2]
    ids = None if ids is None else ids.contiguous()
    total, tiles = out.shape[:2].numel(), norm_tiles(channels)
    parts = triton.cdiv(total, tiles['BLOCK_M'])
    shares = min(triton.cdiv(outputs, tiles['BLOCK_N']), triton.cdiv(_BUSY, parts))
    with _on(x):
        products.norm_linear_kernel[(parts, shares)](
            *(x, _or(ids, x), scale, shift, weight.contiguous(), _or(bias, x), out),
            *(x.shape[1], out.shape[1], total, eps),
            **dict(tiles, OUT=outputs, GATHER=ids is not None, BIAS=bias is not None),
            GELU=gelu,
        )


def _multiply(
    x: Tensor,
    ids: _Maybe,
    of: str,
    weight: Tensor,
    bias: _Maybe,
    residual: _Maybe,
    out: Tensor,
    gelu: bool = False,
    changes: _Maybe = None,
) -> None:
    """Launch a product; ``of`` names the map that ids are of."""
    x = x.contiguous()
    assert weight.shape[1] == x.shape[2]
    ids = None if ids is None else ids.contiguous()
    tokens = dict(x=x, residual=residual, out=out)[of]
    total = x.shape[:2].numel() if ids is None else ids.numel()
    tiles = product_tiles(x.shape[2], gelu)
    grid = triton.cdiv(total, tiles['BLOCK_M']) * triton.cdiv(len(weight), tiles['BLOCK_N'])
    with _on(x):
        products.linear_kernel[(grid,)](
            *(x, _or(ids, x), weight.contiguous(), _or(bias, x), _or(residual, x), out),
            *(_or(changes, x), _or(tokens, x).shape[1], _or(ids, x).shape[1], total),
            **dict(C=x.shape[2], OUT=len(weight), IDS='' if ids is None else of, GELU=gelu),
            **dict(BIAS=bias is not None, RESIDUAL=residual is not None),
            **dict(tiles, COUNT=changes is not None),
        )


def _added(
    now: Tensor, ids: _Maybe, branch: _Maybe, weights: Any, eps: float, into: _Maybe, *_: _Maybe
) -> list[Tensor]:
    shape = (now if ids is None else ids).shape[:2]
    return [] if into is not None else [now.new_empty(*shape, now.shape[2])]


def _add_traffic(
    now: Tensor, ids: _Maybe, branch: _Maybe, weights: list[Tensor], *others: Any
) -> tuple[int, int]:
    moved = _row_bytes(now, ids) + size(others[-1])
    return moved + size(ids, branch, *weights), moved


def _add_flops(
    now: Tensor, ids: _Maybe, branch: _Maybe, weights: list[Tensor], *_: object, **__: object
) -> int:
    count = (now if ids is None else ids).shape[:2].numel()
    return 2 * count * sum(weight.numel() for weight in weights if weight.ndim == 2)


@operator(_added, _add_traffic, ('into', 'changes'), _add_flops)
def add_branch(
    now: Tensor,
    ids: _Maybe,
    branch: _Maybe,
    weights: list[Tensor],
    eps: float,
    into: _Maybe,
    changes: _Maybe,
) -> list[Tensor]:
    """Rows plus their branch (B, K, C): rows of a map now (B, N, C) that ids name, or all.

    Where there is a map ``into`` (B, N, C), rows now (B, K, C) are packed, ids are their places
    there, and nothing is returned. The branch is there, or it is to be made: of (B, K, I) by
    weight and maybe bias; of the rows themselves by those of norm and two layers with GELU between.
    Changes (B, C), if they are there, take up in 64 bits, of which 24 are a fraction, what the
    columns of rows that ids name have changed by.
    """
    made = _added(now, ids, branch, weights, eps, into)
    out = into if into is not None else made[0]
    if branch is None:
        _add_mlp(now, ids, weights, eps, out, changes)
    elif weights:
        weight, bias = (*weights, None)[:2]
        of = 'residual' if into is None else 'out'
        _multiply(branch, ids, of, weight, bias, now, out, False, changes)
    else:
        put(out, ids, now, branch, out, changes)
    return made


def _add_mlp(
    now: Tensor, ids: _Maybe, weights: list[Tensor], eps: float, out: Tensor, changes: _Maybe
) -> None:
    batch, count, channels = now.shape
    scale, shift, first, *others = (weight.contiguous() for weight in weights)
    sizes = out.shape[1], count, batch * count, eps
    with _on(now):
        products.mlp_kernel[(triton.cdiv(batch * count, MLP_TILES['BLOCK_M']),)](
            *(now, _or(ids, now), scale, shift, first, *others, out, _or(changes, now)),
            *sizes,
            **dict(C=channels, P=triton.next_power_of_2(channels), HIDDEN=len(first)),
            **dict(SCATTER=ids is not None, COUNT=changes is not None),
            **MLP_TILES,
        )


def _cells(hw_shape: list[int], side: int) -> list[int]:
    """How many cells there are; a map that is smaller than one is padded to it."""
    return [max(length // side, 1) for length in hw_shape]


def _reduced(x: Tensor, score: str, *args: Any) -> list[Tensor]:
    weight, _, hw_shape = args[-3:]
    high, wide = _cells(hw_shape, weight.shape[1])
    cells = x.new_empty(x.shape[0], high * wide, x.shape[2])
    return [cells, x.new_empty(x.shape[:2], dtype=torch.float32)][: 1 + bool(score)]


def _reduce_flops(*args: Any, **_: object) -> int:
    return 2 * _reduced(*args)[0].shape[:2].numel() * args[7].numel()


@operator(_reduced, flops=_reduce_flops)
def reduce_map(
    x: Tensor,
    score: str,
    mean: _Maybe,
    changes: _Maybe,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor,
    bias: _Maybe,
    hw_shape: list[int],
) -> list[Tensor]:
    """Convolve cells of the LayerNorm of x (B, N, C) by weight (C, S, S, C): (B, cells, C).

    And scores (B, N) of the tokens by ``distance`` or ``activation``, as in ``score_norm``.
    """
    out = _reduced(x, score, mean, changes, scale, shift, eps, weight, bias, hw_shape)
    side, channels = weight.shape[1], x.shape[2]
    total = x.shape[0] * prod(triton.cdiv(length, side) for length in hw_shape)
    sizes = *hw_shape, *_cells(hw_shape, side), total, eps
    with _on(x):
        reductions.reduce_kernel[(triton.cdiv(total, CELL_TILES['BLOCK']),)](
            *(x, _or(mean, x), _or(changes, x), scale, shift, weight, _or(bias, x)),
            *(out[-1], out[0], *sizes),
            **dict(C=channels, P=triton.next_power_of_2(channels), SIDE=side, SCORE=score),
            **dict(CELL_TILES, BIAS=bias is not None),
        )
    return out
