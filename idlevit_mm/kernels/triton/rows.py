"""Kernels of rows of tokens: score, choose, gather, normalise, convolve, and put them back.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, R = B * K packed
rows, C channels (P, the next power of two), M windows of a map, L slots of a window.
"""

import triton
import triton.language as tl

from .windows import is_token, token_at


@triton.jit
def _normalised(v, weight, bias, c, eps, C: tl.constexpr):
    """LayerNorm of rows in float32, zero beyond C."""
    inside = c < C
    centred = tl.where(inside[None, :], v - (tl.sum(v, axis=1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return centred * scale[:, None] * w[None, :] + b[None, :]


@triton.jit
def look_kernel(
    x, mean, weight, bias, scores, normed, N, eps,
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
        centre = tl.load(mean + image * C + c, mask=c < C, other=0.0)
        apart = tl.where(seen, v - centre[None, :], 0.0)
        score = tl.sqrt(tl.sum(apart * apart, axis=1))
    else:
        score = tl.sum(tl.abs(v), axis=1) / C
    tl.store(scores + image.to(tl.int64) * N + row, score, mask=row < N)
    if NORM:
        y = _normalised(v, weight, bias, c, eps, C)
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=seen)


@triton.jit
def _order(score):
    """Float32 as an integer of the same order, from 0 to 2 ** 32 - 1; NaN is above all."""
    # Whatever its sign and payload are.
    bits = tl.where(score == score, score.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def select_kernel(
    scores, ids, offsets, places, N, K, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K best tokens of an image in the order of windows; of equal ones the first.

    A program per image: four steps of eight bits find the K-th score, one more walk packs.
    """
    image = tl.program_id(0)
    base = scores + image.to(tl.int64) * N
    bins = tl.arange(0, 256)
    prefix = tl.zeros([1], tl.uint32)
    left = tl.zeros([1], tl.int32) + K
    for step in tl.static_range(4):
        low = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for first in range(0, N, BLOCK):
            i = first + tl.arange(0, BLOCK)
            key = _order(tl.load(base + i, mask=i < N, other=0.0))
            mine = i < N
            if step > 0:
                mine = mine & ((key >> (low + 8)) == prefix)
            counts += tl.histogram(((key >> low) & 255).to(tl.int32), 256, mask=mine)
        # The highest bin that still reaches K.
        reached = tl.cumsum(counts, axis=0, reverse=True)
        best = tl.sum((reached >= left).to(tl.int32), axis=0) - 1
        left -= tl.sum(tl.where(bins > best, counts, 0), axis=0)
        equal = tl.sum(tl.where(bins == best, counts, 0), axis=0)
        prefix = (prefix << 8) + best.to(tl.uint32)
    # The last token that is kept of those with the K-th score, if not all of them are.
    more = tl.sum((equal > left).to(tl.int32), axis=0)
    last = tl.zeros([1], tl.int32) + N * (1 - more)
    ties = tl.zeros([1], tl.int32)
    for first in range(0, N * more, BLOCK):
        i = first + tl.arange(0, BLOCK)
        same = (_order(tl.load(base + i, mask=i < N, other=0.0)) == prefix) & (i < N)
        rank = tl.cumsum(same.to(tl.int32), axis=0) + ties
        last += tl.sum(tl.where(same & (rank == left), i, 0), axis=0)
        ties += tl.sum(same.to(tl.int32), axis=0)
    windows = (HP // WS) * (WP // WS)
    taken = tl.zeros([1], tl.int32)
    for first in range(0, HP * WP, BLOCK):
        i = first + tl.arange(0, BLOCK)
        token = token_at(i // (WS * WS), i % (WS * WS), W, HP, WP, WS, SHIFT)
        valid = (i < HP * WP) & is_token(i // (WS * WS), i % (WS * WS), H, W, HP, WP, WS, SHIFT)
        key = _order(tl.load(base + token, mask=valid, other=0.0))
        chosen = valid & ((key > prefix) | ((key == prefix) & (token <= last)))
        up_to = tl.cumsum(chosen.to(tl.int32), axis=0) + taken
        place = image * K + up_to - 1
        tl.store(ids + place, token.to(tl.int64), mask=chosen)
        tl.store(places + image.to(tl.int64) * N + token, tl.where(chosen, place, -1), mask=valid)
        starts = (i % (WS * WS) == 0) & (i < HP * WP)
        before = image * K + up_to - chosen.to(tl.int32)
        tl.store(offsets + image * windows + i // (WS * WS), before, mask=starts)
        taken += tl.sum(chosen.to(tl.int32), axis=0)
    if image == tl.num_programs(0) - 1:
        tl.store(offsets + (image + 1) * windows, (image + 1) * K)


@triton.jit
def select_in_windows_kernel(
    scores, starts, ids, offsets, places, N, K, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The best tokens of each window, so many as lie between its ``starts``; one program each.

    BITS are those of 2 ** 32 * SLOTS, above which there is no key.
    """
    window, image = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + window).to(tl.int32)
    count = tl.load(starts + window + 1).to(tl.int32) - start
    slot = tl.arange(0, SLOTS)
    token = token_at(window, slot, W, HP, WP, WS, SHIFT)
    valid = (slot < WS * WS) & is_token(window, slot, H, W, HP, WP, WS, SHIFT)
    score = tl.load(scores + image.to(tl.int64) * N + token, mask=valid, other=0.0)
    # No two are equal: the number of the slot decides. The least one that is kept, bit by bit.
    key = tl.where(valid, _order(score).to(tl.int64) * SLOTS + (SLOTS - slot), 0)
    least = tl.zeros([1], tl.int64)
    one = tl.full([1], 1, tl.int64)
    for step in tl.static_range(BITS):
        more = least + (one << (BITS - 1 - step))
        enough = tl.sum((key >= more).to(tl.int32), axis=0) >= count
        least = tl.where(enough, more, least)
    chosen = valid & (key >= least)
    place = image * K + start + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(ids + place, token.to(tl.int64), mask=chosen)
    tl.store(places + image.to(tl.int64) * N + token, tl.where(chosen, place, -1), mask=valid)
    windows = tl.num_programs(0)
    tl.store(offsets + image * windows + window, image * K + start)
    if (image == tl.num_programs(1) - 1) & (window == windows - 1):
        tl.store(offsets + (image + 1) * windows, (image + 1) * K)


@triton.jit
def rows_kernel(
    x, ids, branch, weight, bias, now, normed, N, K, R, eps,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    GATHER: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rows of x, all or gathered, maybe plus a branch; kept, normalised, or both."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, P)
    there = r < R
    row = r.to(tl.int64)
    if GATHER:
        row = (r // K).to(tl.int64) * N + tl.load(ids + r, mask=there, other=0)
    seen = there[:, None] & (c < C)[None, :]
    packed = r.to(tl.int64)[:, None] * C + c[None, :]
    v = tl.load(x + row[:, None] * C + c[None, :], mask=seen, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(branch + packed, mask=seen, other=0.0).to(tl.float32)
    if KEEP:
        kept = v.to(now.dtype.element_ty)
        tl.store(now + packed, kept, mask=seen)
        v = kept.to(tl.float32)
    if NORM:
        y = _normalised(v, weight, bias, c, eps, C)
        tl.store(normed + packed, y.to(normed.dtype.element_ty), mask=seen)


@triton.jit
def put_kernel(
    x, where, now, branch, out, N, K, R,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr,
    IDLE: tl.constexpr, ACTIVE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Packed rows plus their branch to their places, which their ids say.

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
    if ADD:
        v += tl.load(branch + packed, mask=written, other=0.0).to(tl.float32)
    if COPY:
        # Not a sum: it would make 0.0 of -0.0.
        idle = inside & ((place < 0) & (r < R))[:, None]
        v = tl.where(idle, tl.load(x + at, mask=idle & IDLE, other=0.0).to(tl.float32), v)
        written = written | idle
    tl.store(out + at, v.to(out.dtype.element_ty), mask=written)


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
