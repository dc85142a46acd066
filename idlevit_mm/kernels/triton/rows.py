"""Kernels of rows of tokens: score, gather, normalise, convolve, and put them back.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, R = B * K packed
rows, C channels (P, the next power of two).
"""

import triton
import triton.language as tl


@triton.jit
def normalised(v, weight, bias, c, eps, C: tl.constexpr):
    """LayerNorm of rows in float32, zero beyond C."""
    inside = c < C
    centred = tl.where(inside[None, :], v - (tl.sum(v, axis=1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return centred * scale[:, None] * w[None, :] + b[None, :]


@triton.jit
def centre_at(mean, changes, at, seen, N):
    """Mean of N tokens: as it was, and what they have changed by since; see ``count_changes``."""
    since = tl.load(changes + at, mask=seen, other=0).to(tl.float32) / 16777216.0
    return tl.load(mean + at, mask=seen, other=0.0) + since / N


@triton.jit
def count_changes(changes, change, r, K, R, c, C: tl.constexpr):
    """Add up by image and column c what rows r change by, in fixed point: no order matters."""
    image = r // K
    last = tl.minimum(tl.max(r, axis=0), R - 1) // K
    for i in range(tl.min(r, axis=0) // K, last + 1):
        total = tl.sum(tl.where((image == i)[:, None], change, 0.0), axis=0)
        fixed = (total * 16777216.0).to(tl.int64)
        tl.atomic_add(changes + i * C + c, fixed, mask=c < C, sem='relaxed')


@triton.jit
def sum_kernel(
    x, sums, N, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Add up the tokens of an image, in fixed point as ``count_changes`` does."""
    image, c = tl.program_id(1), tl.arange(0, P)
    total = tl.zeros([P], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        at = (image.to(tl.int64) * N + row)[:, None] * C + c[None, :]
        seen = (row < N)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(x + at, mask=seen, other=0.0).to(tl.float32), axis=0)
    fixed = (total * 16777216.0).to(tl.int64)
    tl.atomic_add(sums + image * C + c, fixed, mask=c < C, sem='relaxed')


@triton.jit
def look_kernel(
    x, mean, changes, weight, bias, scores, normed, N, eps,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    DISTANCE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Scores of all tokens (distance from the mean, or mean activation), and maybe their norm."""
    image = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, P)
    at = (image.to(tl.int64) * N + row)[:, None] * C + c[None, :]
    seen = (row < N)[:, None] & (c < C)[None, :]
    v = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    if DISTANCE:
        centre = centre_at(mean, changes, image * C + c, c < C, N)
        apart = tl.where(seen, v - centre[None, :], 0.0)
        score = tl.sqrt(tl.sum(apart * apart, axis=1))
    else:
        score = tl.sum(tl.abs(v), axis=1) / C
    tl.store(scores + image.to(tl.int64) * N + row, score, mask=row < N)
    if NORM:
        y = normalised(v, weight, bias, c, eps, C)
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=seen)


@triton.jit
def rows_kernel(
    x, ids, branch, weight, bias, out, N, K, R, eps,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    GATHER: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Rows of x, all or gathered, maybe plus a branch, maybe normalised; TURNED, x is (B, C, N)."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, P)
    there = r < R
    row = r.to(tl.int64)
    if GATHER:
        row = (r // K).to(tl.int64) * N + tl.load(ids + r, mask=there, other=0)
    seen = there[:, None] & (c < C)[None, :]
    packed = r.to(tl.int64)[:, None] * C + c[None, :]
    at = row[:, None] * C + c[None, :]
    if TURNED:
        at = (row // N * N * C + row % N)[:, None] + c[None, :] * N
    v = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(branch + packed, mask=seen, other=0.0).to(tl.float32)
    if NORM:
        v = normalised(v, weight, bias, c, eps, C)
    tl.store(out + packed, v.to(out.dtype.element_ty), mask=seen)


@triton.jit
def put_kernel(
    x, where, now, branch, out, changes, N, K, R,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr,
    IDLE: tl.constexpr, ACTIVE: tl.constexpr, ADD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Packed rows, maybe plus their branch, to their places, which their ids say.

    Or with the other rows of x into a copy, of each of whose rows is known which packed one it is;
    what is not IDLE or not ACTIVE is zero there.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, P)
    if COPY:
        place = tl.load(where + r, mask=r < R, other=-1)
        row = r.to(tl.int64)
    else:
        place = tl.where(r < R, r, -1)
        row = (r // K).to(tl.int64) * N + tl.load(where + r, mask=r < R, other=0)
    inside = (c < C)[None, :]
    written = inside & (place >= 0)[:, None]
    packed = place.to(tl.int64)[:, None] * C + c[None, :]
    at = row[:, None] * C + c[None, :]
    v = tl.load(now + packed, mask=written & ACTIVE, other=0.0).to(tl.float32)
    old = v
    if ADD:
        v += tl.load(branch + packed, mask=written, other=0.0).to(tl.float32)
    if COPY:
        # Not a sum: it would make 0.0 of -0.0.
        idle = inside & ((place < 0) & (r < R))[:, None]
        v = tl.where(idle, tl.load(x + at, mask=idle & IDLE, other=0.0).to(tl.float32), v)
        written = written | idle
    new = v.to(out.dtype.element_ty)
    tl.store(out + at, new, mask=written)
    if COUNT:
        count_changes(changes, new.to(tl.float32) - old, r, K, R, c, C)


@triton.jit
def convolve_kernel(
    x, ids, places, weight, bias, out, H, W, K, R,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Depth-wise 3 x 3 convolution of rows of a map, then GELU; zeros stand for idle tokens."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there, inside = r < R, c < C
    image = (r // K).to(tl.int64)
    token = r % K
    if PACKED:
        token = tl.load(ids + r, mask=there, other=0).to(tl.int32)
    ty = token // W
    tx = token % W
    acc = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for dy in tl.static_range(3):
        for dx in tl.static_range(3):
            y = ty + (dy - 1)
            col = tx + (dx - 1)
            seen = there & (y >= 0) & (y < H) & (col >= 0) & (col < W)
            row = image * H * W + y * W + col
            if PACKED:
                row = tl.load(places + row, mask=seen, other=-1).to(tl.int64)
                seen = seen & (row >= 0)
            both = seen[:, None] & inside[None, :]
            v = tl.load(x + row[:, None] * C + c[None, :], mask=both, other=0.0).to(tl.float32)
            w = tl.load(weight + c * 9 + (3 * dy + dx), mask=inside, other=0.0).to(tl.float32)
            acc += v * w[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    y = 0.5 * acc * (1.0 + tl.math.erf(acc * 0.7071067811865476))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])
