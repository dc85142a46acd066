"""Attention within windows, of packed rows or of all tokens in the order of the map.

Packed rows of a window lie between two offsets. Which slot a row has follows from the coordinates
of its token, and so do position bias and region. Padding slots are keys whose key and value are
``blank``, as in the dense block.

Shape letters: C channels, A heads, D = C / A, M windows of a map, R packed rows. H, W are sides of
the map, HP, WP those of the padded map.
"""

import triton
import triton.language as tl


@triton.jit
def token_at(window, slot, W, HP, WP, WS: tl.constexpr, SHIFT: tl.constexpr):
    """Token in a slot of a window; windows are numbered row by row."""
    y, x = _place(window // (WP // WS), window % (WP // WS), slot, HP, WP, WS, SHIFT)
    return y * W + x


@triton.jit
def is_token(window, slot, H, W, HP, WP, WS: tl.constexpr, SHIFT: tl.constexpr):
    """Whether a slot holds a token, not padding."""
    y, x = _place(window // (WP // WS), window % (WP // WS), slot, HP, WP, WS, SHIFT)
    return (y < H) & (x < W)


@triton.jit
def _place(wy, wx, slot, HP, WP, WS: tl.constexpr, SHIFT: tl.constexpr):
    y = wy * WS + slot // WS + SHIFT
    x = wx * WS + slot % WS + SHIFT
    return tl.where(y >= HP, y - HP, y), tl.where(x >= WP, x - WP, x)


@triton.jit
def _region(sy, sx, HP, WP, WS: tl.constexpr, SHIFT: tl.constexpr):
    ry = (sy >= HP - WS).to(tl.int32) + (sy >= HP - SHIFT).to(tl.int32)
    rx = (sx >= WP - WS).to(tl.int32) + (sx >= WP - SHIFT).to(tl.int32)
    return 3 * ry + rx


@triton.jit
def _rows(
    i, start, end, image, wy, wx, ids, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Row, coordinates in the shifted map and validity of the i-th rows of a window."""
    if DENSE:
        y, x = _place(wy, wx, i, HP, WP, WS, SHIFT)
        valid = (i < WS * WS) & (y < H) & (x < W)
        return (image * H * W + y * W + x).to(tl.int64), wy * WS + i // WS, wx * WS + i % WS, valid
    row = start + i
    valid = row < end
    token = tl.load(ids + row, mask=valid, other=0).to(tl.int32)
    y = token // W - SHIFT
    x = token % W - SHIFT
    return row.to(tl.int64), tl.where(y < 0, y + HP, y), tl.where(x < 0, x + WP, x), valid


@triton.jit
def _bias(
    table, qy, qx, ky, kx, head, seen, WS: tl.constexpr, A: tl.constexpr, PAIRS: tl.constexpr
):
    """Position bias of pairs of coordinates, by their steps or, where PAIRS, by their slots."""
    if PAIRS:
        own = head * WS * WS + qy % WS * WS + qx % WS
        place = own[:, None] * (WS * WS) + (ky % WS * WS + kx % WS)[None, :]
    else:
        step = (qy[:, None] - ky[None, :] + WS - 1) * (2 * WS - 1)
        place = (step + qx[:, None] - kx[None, :] + WS - 1) * A + head
    return tl.load(table + place, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _softmax(logit, seen, top):
    """Weights of more keys, how much those before shrink, their sum, and the highest logit."""
    logit = tl.where(seen, logit, float('-inf'))
    new = tl.maximum(top, tl.max(logit, axis=1))
    # Rows that are not there see nothing.
    safe = tl.where(new == float('-inf'), 0.0, new)
    weights = tl.exp2(logit - safe[:, None])
    return weights, tl.exp2(top - safe), tl.sum(weights, axis=1), new


@triton.jit
def _window(offsets, windows, WP, A: tl.constexpr, WS: tl.constexpr, DENSE: tl.constexpr):
    """Head, image, place, and first and last row but one of the window of a program."""
    program = tl.program_id(0)
    image = program // A // windows
    window = program // A % windows
    start = 0
    end = WS * WS
    if not DENSE:
        start = tl.load(offsets + program // A)
        end = tl.load(offsets + program // A + 1)
    return program % A, image, window // (WP // WS), window % (WP // WS), start, end


@triton.jit
def attention_kernel(
    qkv, ids, offsets, table, blank, out, lse, H, W, HP, WP, windows, scale,
    A: tl.constexpr, D: tl.constexpr, WS: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, DENSE: tl.constexpr, TRAINS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program per window and head; heads of a window are neighbours, for they share lines.

    Where it TRAINS, biases are those of pairs of slots, and what sums of weights are is kept.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    C: tl.constexpr = A * D
    head, image, wy, wx, start, end = _window(offsets, windows, WP, A, WS, DENSE)
    channel = head * D + tl.arange(0, D)
    factor = scale * LOG2E
    for m in range(0, end - start, BLOCK_M):
        rows, qy, qx, valid = _rows(
            m + tl.arange(0, BLOCK_M), start, end, image, wy, wx, ids, H, W, HP, WP,
            WS, SHIFT, DENSE,
        )  # fmt: skip
        at = rows[:, None] * (3 * C) + channel[None, :]
        q = tl.load(qkv + at, mask=valid[:, None], other=0.0)
        own = _region(qy, qx, HP, WP, WS, SHIFT)
        top = tl.full([BLOCK_M], float('-inf'), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        if PADDED:
            # All padding keys have one logit per query but for the bias: they need no product.
            low = (wy * WS + WS + SHIFT > H) | (wx * WS + WS + SHIFT > W)
            key = tl.load(blank + C + channel).to(tl.float32)
            value = tl.load(blank + 2 * C + channel).to(tl.float32)
            flat = tl.sum(q.to(tl.float32) * key[None, :], axis=1) * factor
            for p in range(0, low.to(tl.int32) * WS * WS, BLOCK_N):
                slot = p + tl.arange(0, BLOCK_N)
                y, x = _place(wy, wx, slot, HP, WP, WS, SHIFT)
                py = wy * WS + slot // WS
                px = wx * WS + slot % WS
                seen = valid[:, None] & ((slot < WS * WS) & ((y >= H) | (x >= W)))[None, :]
                bias = _bias(table, qy, qx, py, px, head, seen, WS, A, TRAINS)
                logit = flat[:, None] + bias * LOG2E
                if SHIFT > 0:
                    seen = seen & (own[:, None] == _region(py, px, HP, WP, WS, SHIFT)[None, :])
                _, shrink, added, top = _softmax(logit, seen, top)
                total = total * shrink + added
                acc = acc * shrink[:, None] + added[:, None] * value[None, :]
        for n in range(0, end - start, BLOCK_N):
            keys, ky, kx, there = _rows(
                n + tl.arange(0, BLOCK_N), start, end, image, wy, wx, ids, H, W, HP, WP,
                WS, SHIFT, DENSE,
            )  # fmt: skip
            base = qkv + keys * (3 * C)
            k = tl.load(base[None, :] + (C + channel)[:, None], mask=there[None, :], other=0.0)
            v = tl.load(base[:, None] + (2 * C + channel)[None, :], mask=there[:, None], other=0.0)
            seen = valid[:, None] & there[None, :]
            logit = tl.dot(q, k, input_precision='ieee') * factor
            logit += _bias(table, qy, qx, ky, kx, head, seen, WS, A, TRAINS) * LOG2E
            if SHIFT > 0:
                seen = seen & (own[:, None] == _region(ky, kx, HP, WP, WS, SHIFT)[None, :])
            weights, shrink, added, top = _softmax(logit, seen, top)
            total = total * shrink + added
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision='ieee')
        total = tl.where(total == 0.0, 1.0, total)
        acc = acc / total[:, None]
        at = rows[:, None] * C + channel[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None])
        if TRAINS:
            tl.store(lse + rows * A + head, top + tl.log2(total), mask=valid)
