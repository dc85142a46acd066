"""Products with what surrounds them: gather and norm before, GELU, residual and scatter behind.

Widths are rarely powers of two, and tiles must be: inner dimensions are walked in steps, so that no
product is padded there, but for that of a norm, whose rows are kept. Tiles of columns are
neighbours in the grid: those of one row read it together, and once from memory.

Shape letters: N tokens of the map, K rows of an image, R rows of the batch, C channels in (P, the
next power of two), OUT channels out.
"""

import triton
import triton.language as tl

from .rows import count_changes, normalised


@triton.jit
def _gelu(x):
    """Not the tanh form, which dense models do not have."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def linear_kernel(
    x, ids, weight, bias, residual, out, changes, N, K, R,
    C: tl.constexpr, OUT: tl.constexpr, IDS: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A linear layer of rows; IDS says which of ``x``, ``residual`` and ``out`` is a map."""
    COLUMNS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    r = program // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    there = r < R
    packed = r.to(tl.int64)
    place = packed
    if IDS != '':
        place = (r // K).to(tl.int64) * N + tl.load(ids + r, mask=there, other=0)
    start = (place if IDS == 'x' else packed) * C
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, C, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        seen = there[:, None] & (c < C)[None, :]
        v = tl.load(x + start[:, None] + c[None, :], mask=seen, other=0.0)
        used = (n < OUT)[None, :] & (c < C)[:, None]
        w = tl.load(weight + n[None, :] * C + c[:, None], mask=used, other=0.0)
        acc = tl.dot(v.to(w.dtype), w, acc, input_precision='ieee')
    if BIAS:
        acc += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = _gelu(acc)
    seen = there[:, None] & (n < OUT)[None, :]
    if RESIDUAL:
        at = (place if IDS == 'residual' else packed)[:, None] * OUT + n[None, :]
        old = tl.load(residual + at, mask=seen, other=0.0).to(tl.float32)
        acc += old
    at = (place if IDS == 'out' else packed)[:, None] * OUT + n[None, :]
    new = acc.to(out.dtype.element_ty)
    tl.store(out + at, new, mask=seen)
    if COUNT:
        change = tl.where(seen, new.to(tl.float32) - old, 0.0)
        count_changes(changes, change, r, K, R, n, OUT)


@triton.jit
def norm_linear_kernel(
    x, ids, norm_weight, norm_bias, weight, bias, out, N, K, R, eps,
    C: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A linear layer of the norm of rows, which are read once for all tiles of columns.

    So many programs as the second side of the grid has share the tiles of columns.
    """
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, P)
    there = r < R
    place = r.to(tl.int64)
    if GATHER:
        place = (r // K).to(tl.int64) * N + tl.load(ids + r, mask=there, other=0)
    seen = there[:, None] & (c < C)[None, :]
    v = tl.load(x + place[:, None] * C + c[None, :], mask=seen, other=0.0)
    y = normalised(v.to(tl.float32), norm_weight, norm_bias, c, eps, C)
    y = y.to(weight.dtype.element_ty)
    for first in range(tl.program_id(1) * BLOCK_N, OUT, tl.num_programs(1) * BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        used = (c < C)[:, None] & (n < OUT)[None, :]
        w = tl.load(weight + n[None, :] * C + c[:, None], mask=used, other=0.0)
        acc = tl.dot(y, w, input_precision='ieee')
        if BIAS:
            acc += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
        if GELU:
            acc = _gelu(acc)
        at = r.to(tl.int64)[:, None] * OUT + n[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=there[:, None] & (n < OUT)[None, :])


@triton.jit
def mlp_kernel(
    x, ids, norm_weight, norm_bias, weight1, bias1, weight2, bias2, out, changes, N, K, R,
    eps,
    C: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, SCATTER: tl.constexpr,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Norm, linear, GELU, linear and residual of packed rows: hidden channels never leave it."""
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, P)
    there = r < R
    packed = r.to(tl.int64) * C
    seen = there[:, None] & (c < C)[None, :]
    v = tl.load(x + packed[:, None] + c[None, :], mask=seen, other=0.0)
    y = normalised(v.to(tl.float32), norm_weight, norm_bias, c, eps, C)
    y = y.to(weight1.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, P], tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        used = (c < C)[:, None] & (h < HIDDEN)[None, :]
        w = tl.load(weight1 + h[None, :] * C + c[:, None], mask=used, other=0.0)
        b = tl.load(bias1 + h, mask=h < HIDDEN, other=0.0).to(tl.float32)
        hidden = _gelu(tl.dot(y, w, input_precision='ieee') + b[None, :])
        used = (h < HIDDEN)[:, None] & (c < C)[None, :]
        w = tl.load(weight2 + c[None, :] * HIDDEN + h[:, None], mask=used, other=0.0)
        acc = tl.dot(hidden.to(w.dtype), w, acc, input_precision='ieee')
    acc += tl.load(bias2 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    # Again from the cache: it is not to fill registers meanwhile.
    old = tl.load(x + packed[:, None] + c[None, :], mask=seen, other=0.0).to(tl.float32)
    place = packed
    if SCATTER:
        place = ((r // K).to(tl.int64) * N + tl.load(ids + r, mask=there, other=0)) * C
    new = (acc + old).to(out.dtype.element_ty)
    tl.store(out + place[:, None] + c[None, :], new, mask=seen)
    if COUNT:
        change = tl.where(seen, new.to(tl.float32) - old, 0.0)
        count_changes(changes, change, r, K, R, c, C)
