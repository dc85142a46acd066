"""Gradients of attention within windows; weights are computed anew from the sums of each row.

No two programs add to one number: what windows share, the position bias and ``blank``, comes in
parts that are added up afterwards.

Shape letters: those of ``windows``, and L slots of a window.
"""

import triton
import triton.language as tl

from .windows import _bias, _place, _region, _rows, _window


@triton.jit
def _slopes(q, k, v, g, top, mean, bias, seen, factor):
    """Weights of pairs of queries and keys, and gradients of their logits."""
    LOG2E: tl.constexpr = 1.4426950408889634
    logit = tl.dot(q, tl.trans(k), input_precision='ieee') * factor + bias * LOG2E
    weights = tl.where(seen, tl.exp2(logit - top[:, None]), 0.0)
    back = tl.dot(g, tl.trans(v), input_precision='ieee')
    return weights, weights * (back - mean[:, None])


@triton.jit
def _queries(qkv, out, grad, lse, rows, valid, head, A: tl.constexpr, D: tl.constexpr):
    """Queries, gradients of what they got, their sums, and the means of gradients of weights."""
    C: tl.constexpr = A * D
    at = rows[:, None] * C + (head * D + tl.arange(0, D))[None, :]
    some = valid[:, None]
    q = tl.load(qkv + at + 2 * C * rows[:, None], mask=some, other=0.0)
    g = tl.load(grad + at, mask=some, other=0.0)
    o = tl.load(out + at, mask=some, other=0.0)
    mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    return q, g, tl.load(lse + rows * A + head, mask=valid, other=0.0), mean


@triton.jit
def _keys(qkv, rows, valid, head, A: tl.constexpr, D: tl.constexpr):
    at = rows[:, None] * (3 * A * D) + (A * D + head * D + tl.arange(0, D))[None, :]
    k = tl.load(qkv + at, mask=valid[:, None], other=0.0)
    return k, tl.load(qkv + at + A * D, mask=valid[:, None], other=0.0)


@triton.jit
def rows_gradient_kernel(
    qkv, ids, offsets, pairs, blank, out, lse, grad, grad_qkv, grad_blank, means,
    H, W, HP, WP, windows, scale,
    A: tl.constexpr, D: tl.constexpr, WS: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and values, and a part of that of ``blank``.

    A program per window and head, as ``attention_kernel``.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    C: tl.constexpr = A * D
    head, image, wy, wx, start, end = _window(offsets, windows, WP, A, WS, DENSE)
    channel = head * D + tl.arange(0, D)
    factor = scale * LOG2E
    key_sum = tl.zeros([D], tl.float32)
    value_sum = tl.zeros([D], tl.float32)
    kind = grad_qkv.dtype.element_ty
    for m in range(0, end - start, BLOCK):
        rows, qy, qx, valid = _rows(
            m + tl.arange(0, BLOCK), start, end, image, wy, wx, ids, H, W, HP, WP, WS, SHIFT, DENSE,
        )  # fmt: skip
        q, g, top, mean = _queries(qkv, out, grad, lse, rows, valid, head, A, D)
        tl.store(means + rows * A + head, mean, mask=valid)
        own = _region(qy, qx, HP, WP, WS, SHIFT)
        dq = tl.zeros([BLOCK, D], tl.float32)
        if PADDED:
            low = (wy * WS + WS + SHIFT > H) | (wx * WS + WS + SHIFT > W)
            key = tl.load(blank + C + channel).to(tl.float32)
            value = tl.load(blank + 2 * C + channel).to(tl.float32)
            flat = tl.sum(q.to(tl.float32) * key[None, :], axis=1) * factor - top
            back = tl.sum(g.to(tl.float32) * value[None, :], axis=1) - mean
            total = tl.zeros([BLOCK], tl.float32)
            for p in range(0, low.to(tl.int32) * WS * WS, BLOCK):
                slot = p + tl.arange(0, BLOCK)
                y, x = _place(wy, wx, slot, HP, WP, WS, SHIFT)
                py = wy * WS + slot // WS
                px = wx * WS + slot % WS
                seen = valid[:, None] & ((slot < WS * WS) & ((y >= H) | (x >= W)))[None, :]
                logit = (
                    flat[:, None] + _bias(pairs, qy, qx, py, px, head, seen, WS, A, True) * LOG2E
                )
                if SHIFT > 0:
                    seen = seen & (own[:, None] == _region(py, px, HP, WP, WS, SHIFT)[None, :])
                total += tl.sum(tl.where(seen, tl.exp2(logit), 0.0), axis=1)
            slope = total * back
            dq += slope[:, None] * key[None, :]
            key_sum += tl.sum(slope[:, None] * q.to(tl.float32), axis=0) * scale
            value_sum += tl.sum(total[:, None] * g.to(tl.float32), axis=0)
        for n in range(0, end - start, BLOCK):
            keys, ky, kx, there = _rows(
                n + tl.arange(0, BLOCK), start, end, image, wy, wx, ids, H, W, HP, WP,
                WS, SHIFT, DENSE,
            )  # fmt: skip
            k, v = _keys(qkv, keys, there, head, A, D)
            seen = valid[:, None] & there[None, :]
            bias = _bias(pairs, qy, qx, ky, kx, head, seen, WS, A, True)
            if SHIFT > 0:
                seen = seen & (own[:, None] == _region(ky, kx, HP, WP, WS, SHIFT)[None, :])
            _, slopes = _slopes(q, k, v, g, top, mean, bias, seen, factor)
            dq += tl.dot(slopes.to(k.dtype), k, input_precision='ieee')
        at = rows[:, None] * (3 * C) + channel[None, :]
        tl.store(grad_qkv + at, (dq * scale).to(kind), mask=valid[:, None])
    if PADDED:
        part = grad_blank + (tl.program_id(0) // A).to(tl.int64) * (3 * C) + channel
        # Padding asks nothing.
        tl.store(part, tl.zeros([D], tl.float32))
        tl.store(part + C, key_sum)
        tl.store(part + 2 * C, value_sum)
    for n in range(0, end - start, BLOCK):
        keys, ky, kx, there = _rows(
            n + tl.arange(0, BLOCK), start, end, image, wy, wx, ids, H, W, HP, WP, WS, SHIFT, DENSE,
        )  # fmt: skip
        k, v = _keys(qkv, keys, there, head, A, D)
        own = _region(ky, kx, HP, WP, WS, SHIFT)
        dk = tl.zeros([BLOCK, D], tl.float32)
        dv = tl.zeros([BLOCK, D], tl.float32)
        for m in range(0, end - start, BLOCK):
            rows, qy, qx, valid = _rows(
                m + tl.arange(0, BLOCK), start, end, image, wy, wx, ids, H, W, HP, WP,
                WS, SHIFT, DENSE,
            )  # fmt: skip
            q, g, top, mean = _queries(qkv, out, grad, lse, rows, valid, head, A, D)
            seen = valid[:, None] & there[None, :]
            bias = _bias(pairs, qy, qx, ky, kx, head, seen, WS, A, True)
            if SHIFT > 0:
                seen = seen & (_region(qy, qx, HP, WP, WS, SHIFT)[:, None] == own[None, :])
            weights, slopes = _slopes(q, k, v, g, top, mean, bias, seen, factor)
            dv += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision='ieee')
            dk += tl.dot(tl.trans(slopes.to(q.dtype)), q, input_precision='ieee')
        at = keys[:, None] * (3 * C) + channel[None, :]
        tl.store(grad_qkv + at + C, (dk * scale).to(kind), mask=there[:, None])
        tl.store(grad_qkv + at + 2 * C, dv.to(kind), mask=there[:, None])


@triton.jit
def _slots(
    slot, image, wy, wx, places, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Rows of some slots, whether they are there, whether they are padding, and their regions."""
    y, x = _place(wy, wx, slot, HP, WP, WS, SHIFT)
    valid = slot < WS * WS
    inside = valid & (y < H) & (x < W)
    row = image.to(tl.int64) * H * W + y * W + x
    active = inside
    if not DENSE:
        row = tl.load(places + row, mask=inside, other=-1).to(tl.int64)
        active = row >= 0
    region = _region(wy * WS + slot // WS, wx * WS + slot % WS, HP, WP, WS, SHIFT)
    return row, active, valid & (inside == 0), region


@triton.jit
def pairs_gradient_kernel(
    qkv, places, pairs, blank, lse, means, grad, grad_pairs,
    H, W, HP, WP, windows, total, scale,
    A: tl.constexpr, D: tl.constexpr, WS: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, DENSE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Parts of the gradient of the bias of pairs of slots.

    A program sums up a tile of one head over every so many of all windows, laid out in slots.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    C: tl.constexpr = A * D
    L: tl.constexpr = WS * WS
    head, part = tl.program_id(0), tl.program_id(2)
    side: tl.constexpr = (L + SLOTS - 1) // SLOTS
    qs = tl.program_id(1) // side * SLOTS + tl.arange(0, SLOTS)
    ks = tl.program_id(1) % side * SLOTS + tl.arange(0, SLOTS)
    channel = head * D + tl.arange(0, D)
    place = (head * L + qs)[:, None] * L + ks[None, :]
    both = (qs < L)[:, None] & (ks < L)[None, :]
    bias = tl.load(pairs + place, mask=both, other=0.0).to(tl.float32)
    sums = tl.zeros([SLOTS, SLOTS], tl.float32)
    for number in range(part, total, tl.num_programs(2)):
        image = number // windows
        wy = number % windows // (WP // WS)
        wx = number % windows % (WP // WS)
        rows, valid, _, own = _slots(qs, image, wy, wx, places, H, W, HP, WP, WS, SHIFT, DENSE)
        keys, there, padding, other = _slots(
            ks, image, wy, wx, places, H, W, HP, WP, WS, SHIFT, DENSE
        )
        q = tl.load(
            qkv + rows[:, None] * (3 * C) + channel[None, :], mask=valid[:, None], other=0.0
        )
        g = tl.load(grad + rows[:, None] * C + channel[None, :], mask=valid[:, None], other=0.0)
        top = tl.load(lse + rows * A + head, mask=valid, other=0.0)
        mean = tl.load(means + rows * A + head, mask=valid, other=0.0)
        k, v = _keys(qkv, keys, there, head, A, D)
        if PADDED:
            key = tl.load(blank + C + channel).to(k.dtype)
            value = tl.load(blank + 2 * C + channel).to(v.dtype)
            k = tl.where(padding[:, None], key[None, :], k)
            v = tl.where(padding[:, None], value[None, :], v)
            there = there | padding
        # None is equal to another where it is not there.
        seen = tl.where(valid, own, -1)[:, None] == tl.where(there, other, -2)[None, :]
        _, slopes = _slopes(q, k, v, g, top, mean, bias, seen, scale * LOG2E)
        sums += slopes
    tl.store(grad_pairs + part.to(tl.int64) * (A * L * L) + place, sums, mask=both)
