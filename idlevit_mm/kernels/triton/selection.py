"""Kernels that choose tokens: the K best of an image, packed in the order of windows.

Of equal scores the first are chosen, by the numbers of their tokens. A key is a score as an integer
of 32 bits.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, M windows of a
map. H, W are sides of the map, HP, WP those of the padded map.
"""

import triton
import triton.language as tl

from .windows import is_token, token_at


@triton.jit
def _order(score):
    """Float32 as an integer of 32 bits of the same order; NaN is the highest of all."""
    # Whatever its sign and payload are.
    bits = tl.where(score == score, score.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(base, i, N):
    """Keys of some tokens; that of none is the lowest, which no score has."""
    return tl.where(i < N, _order(tl.load(base + i, mask=i < N, other=0.0)), -0x80000000)


@triton.jit
def _in_order(base, i, H, W, HP, WP, WS: tl.constexpr, SHIFT: tl.constexpr):
    """Tokens in some places of all windows, whether they are there, and their keys."""
    token = token_at(i // (WS * WS), i % (WS * WS), W, HP, WP, WS, SHIFT)
    valid = (i < HP * WP) & is_token(i // (WS * WS), i % (WS * WS), H, W, HP, WP, WS, SHIFT)
    return token, valid, _order(tl.load(base + token, mask=valid, other=0.0))


@triton.jit
def _last(base, least, left, more, N, BLOCK: tl.constexpr):
    """The last token that is kept of those with the lowest key: N if no more have it than are."""
    last = tl.zeros([1], tl.int32) + N * (1 - more)
    ties = tl.zeros([1], tl.int32)
    for first in range(0, N * more, BLOCK):
        i = first + tl.arange(0, BLOCK)
        same = (_keys(base, i, N) == least) & (i < N)
        rank = tl.cumsum(same.to(tl.int32), axis=0) + ties
        last += tl.sum(tl.where(same & (rank == left), i, 0), axis=0)
        ties += tl.sum(same.to(tl.int32), axis=0)
    return tl.sum(last, axis=0)


@triton.jit
def _raised(low, count, pivot, found, K):
    """The lower key, and how many reach it: the pivot if K keys do."""
    return tl.where(found >= K, pivot, low), tl.where(found >= K, found, count)


@triton.jit
def _lowered(high, above, pivot, found, K):
    """The higher key, and how many are above it: the one before the pivot if fewer reach that."""
    return tl.where(found < K, pivot - 1, high), tl.where(found < K, found, above)


@triton.jit
def _cut(base, K, N, BLOCK: tl.constexpr):
    """The lowest key of the K best, and the last token that is kept of those with it.

    It lies between two keys, which three more a step, each counted, bring four times as near; as
    soon as exactly K keys reach the lower one, that one does. Most scores differ in few of their
    first bits and need few of their last.
    """
    i = tl.arange(0, BLOCK)
    most = _keys(base, i, N)
    least = tl.where(i < N, most, 0x7FFFFFFF)
    for first in range(BLOCK, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        key = _keys(base, i, N)
        most = tl.maximum(most, key)
        least = tl.minimum(least, tl.where(i < N, key, 0x7FFFFFFF))
    low = tl.min(least, axis=0).to(tl.int64)
    high = tl.max(most, axis=0).to(tl.int64)
    # How many keys reach the lower one, and how many are above the higher one.
    count = N + (low & 0)
    above = low & 0
    while (count > K) & (low < high):
        step = (high - low + 4) >> 2
        first_pivot = low + step
        second = tl.minimum(first_pivot + step, high)
        third = tl.minimum(second + step, high)
        one, two, three = first_pivot.to(tl.int32), second.to(tl.int32), third.to(tl.int32)
        # Three counts in one number: those of a thread have 10 bits each, those of all 21.
        found = tl.zeros([BLOCK], tl.int32)
        for first in range(0, N, BLOCK):
            key = _keys(base, first + tl.arange(0, BLOCK), N)
            found += (key >= one).to(tl.int32) + ((key >= two).to(tl.int32) << 10)
            found += (key >= three).to(tl.int32) << 20
        wide = (found & 1023).to(tl.int64) + (((found >> 10) & 1023).to(tl.int64) << 21)
        sums = tl.sum(wide + ((found >> 20).to(tl.int64) << 42), axis=0)
        of_one, of_two, of_three = sums & 0x1FFFFF, (sums >> 21) & 0x1FFFFF, sums >> 42
        low, count = _raised(low, count, first_pivot, of_one, K)
        low, count = _raised(low, count, second, of_two, K)
        low, count = _raised(low, count, third, of_three, K)
        high, above = _lowered(high, above, third, of_three, K)
        high, above = _lowered(high, above, second, of_two, K)
        high, above = _lowered(high, above, first_pivot, of_one, K)
    more = (count > K).to(tl.int32)
    return low.to(tl.int32), _last(base, low.to(tl.int32), (K - above).to(tl.int32), more, N, BLOCK)


@triton.jit
def _pack(
    base, ids, offsets, places, image, i, taken, least, last, N, K, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pack what is chosen of some places behind what was taken before: how many those are."""
    windows = (HP // WS) * (WP // WS)
    token, valid, key = _in_order(base, i, H, W, HP, WP, WS, SHIFT)
    chosen = valid & ((key > least) | ((key == least) & (token <= last)))
    up_to = tl.cumsum(chosen.to(tl.int32), axis=0) + taken
    place = image * K + up_to - 1
    tl.store(ids + place, token.to(tl.int64), mask=chosen)
    tl.store(places + image.to(tl.int64) * N + token, tl.where(chosen, place, -1), mask=valid)
    starts = (i % (WS * WS) == 0) & (i < HP * WP)
    before = image * K + up_to - chosen.to(tl.int32)
    tl.store(offsets + image * windows + i // (WS * WS), before, mask=starts)
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def select_kernel(
    scores, ids, offsets, places, N, K, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The K best tokens of an image in the order of windows; of equal ones the first.

    A program per image.
    """
    image = tl.program_id(0)
    base = scores + image.to(tl.int64) * N
    least, last = _cut(base, K, N, BLOCK)
    taken = tl.zeros([1], tl.int32)
    for first in range(0, HP * WP, SLOTS):
        taken += _pack(
            base, ids, offsets, places, image, first + tl.arange(0, SLOTS), taken, least, last,
            N, K, H, W, HP, WP, WS, SHIFT,
        )  # fmt: skip
    if image == tl.num_programs(0) - 1:
        tl.store(offsets + (image + 1) * (HP // WS) * (WP // WS), (image + 1) * K)


@triton.jit
def cut_kernel(scores, known, N, K, BLOCK: tl.constexpr):
    """What ``pack_kernel`` needs to know of each image; a program each."""
    image = tl.program_id(0)
    least, last = _cut(scores + image.to(tl.int64) * N, K, N, BLOCK)
    tl.store(known + 2 * image, least)
    tl.store(known + 2 * image + 1, last)


@triton.jit
def pack_kernel(
    scores, known, ids, offsets, places, N, K, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack those of a block of an image that ``cut_kernel`` has found; a program each."""
    block, image = tl.program_id(0), tl.program_id(1)
    base = scores + image.to(tl.int64) * N
    least, last = tl.load(known + 2 * image), tl.load(known + 2 * image + 1)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, block * BLOCK, BLOCK):
        i = first + tl.arange(0, BLOCK)
        token, valid, key = _in_order(base, i, H, W, HP, WP, WS, SHIFT)
        before += (valid & ((key > least) | ((key == least) & (token <= last)))).to(tl.int32)
    taken = tl.sum(before, axis=0)
    _pack(
        base, ids, offsets, places, image, block * BLOCK + tl.arange(0, BLOCK), taken, least, last,
        N, K, H, W, HP, WP, WS, SHIFT,
    )  # fmt: skip
    if (image == tl.num_programs(1) - 1) & (block == tl.num_programs(0) - 1):
        tl.store(offsets + (image + 1) * (HP // WS) * (WP // WS), (image + 1) * K)


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
    order = _order(score).to(tl.int64) + 0x80000000
    key = tl.where(valid, order * SLOTS + (SLOTS - slot), 0)
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
