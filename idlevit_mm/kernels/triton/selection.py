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
    """Float32 as an integer of the same order, from 0 to 2 ** 32 - 1; NaN is above all."""
    # Whatever its sign and payload are.
    bits = tl.where(score == score, score.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _in_order(base, i, H, W, HP, WP, WS: tl.constexpr, SHIFT: tl.constexpr):
    """Tokens in some places of all windows, whether they are there, and their keys."""
    token = token_at(i // (WS * WS), i % (WS * WS), W, HP, WP, WS, SHIFT)
    valid = (i < HP * WP) & is_token(i // (WS * WS), i % (WS * WS), H, W, HP, WP, WS, SHIFT)
    return token, valid, _order(tl.load(base + token, mask=valid, other=0.0))


@triton.jit
def _reached(counts, left, BINS: tl.constexpr):
    """The highest bin that still reaches ``left``, how many of it are left, and how many it has."""
    bins = tl.arange(0, BINS)
    best = tl.sum((tl.cumsum(counts, axis=0, reverse=True) >= left).to(tl.int32), axis=0) - 1
    left -= tl.sum(tl.where(bins > best, counts, 0), axis=0)
    return best, left, tl.sum(tl.where(bins == best, counts, 0), axis=0)


@triton.jit
def _last(base, least, left, equal, N, BLOCK: tl.constexpr):
    """The last token that is kept of those with the K-th key: N if all of them are."""
    more = tl.sum((equal > left).to(tl.int32), axis=0)
    last = tl.zeros([1], tl.int32) + N * (1 - more)
    ties = tl.zeros([1], tl.int32)
    for first in range(0, N * more, BLOCK):
        i = first + tl.arange(0, BLOCK)
        same = (_order(tl.load(base + i, mask=i < N, other=0.0)) == least) & (i < N)
        rank = tl.cumsum(same.to(tl.int32), axis=0) + ties
        last += tl.sum(tl.where(same & (rank == left), i, 0), axis=0)
        ties += tl.sum(same.to(tl.int32), axis=0)
    return last


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
    WS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K best tokens of an image in the order of windows; of equal ones the first.

    A program per image: four steps of eight bits find the K-th score, one more walk packs.
    """
    image = tl.program_id(0)
    base = scores + image.to(tl.int64) * N
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
        best, left, equal = _reached(counts, left, 256)
        prefix = (prefix << 8) + best.to(tl.uint32)
    last = _last(base, prefix, left, equal, N, BLOCK)
    taken = tl.zeros([1], tl.int32)
    for first in range(0, HP * WP, BLOCK):
        taken += _pack(
            base, ids, offsets, places, image, first + tl.arange(0, BLOCK), taken, prefix, last,
            N, K, H, W, HP, WP, WS, SHIFT,
        )  # fmt: skip
    if image == tl.num_programs(0) - 1:
        tl.store(offsets + (image + 1) * (HP // WS) * (WP // WS), (image + 1) * K)


@triton.jit
def _summed(parts, blocks, block, BINS: tl.constexpr):
    """Counts of all blocks of an image, and of those before one."""
    counts = tl.zeros([BINS], tl.int32)
    early = tl.zeros([BINS], tl.int32)
    for first in range(0, blocks, 16):
        row = first + tl.arange(0, 16)
        at = row[:, None] * BINS + tl.arange(0, BINS)[None, :]
        found = tl.load(parts + at, mask=(row < blocks)[:, None], other=0)
        counts += tl.sum(found, axis=0)
        early += tl.sum(tl.where((row < block)[:, None], found, 0), axis=0)
    return counts, early


@triton.jit
def count_kernel(
    scores, parts, middle, above, known, N, K, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Count keys by 10, 12 and 10 bits, in a launch each, among those that began as the K-th does.

    A program per block and image. First and last counts are written block by block (B, blocks,
    1024), those between are added up in ``middle`` (B, 4096), which the first launch clears.
    ``known`` (B, 4) is the first bits of the K-th key and how many of those are left, twice.
    """
    block, image, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    base, known = scores + image.to(tl.int64) * N, known + 4 * image
    own, sums = parts + image * blocks * 1024, middle + image * 4096 + tl.arange(0, 4096)
    i = block * BLOCK + tl.arange(0, BLOCK)
    _, valid, key = _in_order(base, i, H, W, HP, WP, WS, SHIFT)
    if STEP == 0:
        counts = tl.histogram((key >> 22).to(tl.int32), 1024, mask=valid)
        if block == 0:
            tl.store(sums, tl.zeros([4096], tl.int32))
    if STEP == 1:
        counts, _ = _summed(own, blocks, block, 1024)
        best, left, _ = _reached(counts, K, 1024)
        mine = valid & ((key >> 22).to(tl.int32) == best)
        # A histogram of so many bins would take all registers; these bits are spread evenly.
        at = middle + image * 4096 + ((key >> 10) & 4095).to(tl.int32)
        tl.atomic_add(at, tl.full([BLOCK], 1, tl.int32), mask=mine, sem='relaxed')
        if block == 0:
            tl.store(known, best)
            tl.store(known + 1, left)
    if STEP == 2:
        best, left, _ = _reached(tl.load(sums), tl.load(known + 1), 4096)
        best += tl.load(known) << 12
        start = (key >> 10).to(tl.int32)
        counts = tl.histogram((key & 1023).to(tl.int32), 1024, mask=valid & (start == best))
        tl.store(above + image * blocks + block, tl.sum((valid & (start > best)).to(tl.int32)))
        if block == 0:
            tl.store(known + 2, best)
            tl.store(known + 3, left)
    if STEP != 1:
        tl.store(own + block * 1024 + tl.arange(0, 1024), counts)


@triton.jit
def pack_kernel(
    scores, parts, above, known, ids, offsets, places, N, K, H, W, HP, WP,
    WS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack the tokens of a block that are among the K best of an image, after ``count_kernel``."""
    block, image, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    base = scores + image.to(tl.int64) * N
    bins = tl.arange(0, 1024)
    counts, early = _summed(parts + image * blocks * 1024, blocks, block, 1024)
    left = tl.zeros([1], tl.int32) + tl.load(known + 4 * image + 3)
    best, left, equal = _reached(counts, left, 1024)
    least = ((tl.load(known + 4 * image + 2) << 10) + best).to(tl.uint32, bitcast=True)
    last = _last(base, least, left, equal, N, BLOCK)
    taken = tl.zeros([1], tl.int32) + tl.sum(tl.where(bins > best, early, 0), axis=0)
    for first in range(0, block, 1024):
        row = first + bins
        taken += tl.sum(tl.load(above + image * blocks + row, mask=row < block, other=0), axis=0)
    # Of ties that are not all kept it must be seen which lie in the blocks before.
    some = tl.sum((equal > left).to(tl.int32), axis=0)
    taken += tl.sum(tl.where(bins == best, early, 0), axis=0) * (1 - some)
    for first in range(block * some):
        i = first * BLOCK + tl.arange(0, BLOCK)
        token, valid, key = _in_order(base, i, H, W, HP, WP, WS, SHIFT)
        taken += tl.sum((valid & (key == least) & (token <= last)).to(tl.int32), axis=0)
    _pack(
        base, ids, offsets, places, image, block * BLOCK + tl.arange(0, BLOCK), taken, least, last,
        N, K, H, W, HP, WP, WS, SHIFT,
    )  # fmt: skip
    if (image == tl.num_programs(1) - 1) & (block == blocks - 1):
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
