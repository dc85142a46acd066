"""Spatial reduction in one read of the map: scores, norm, and the convolution of cells.

Shape letters: C channels (P, the next power of two), H, W sides of the map, R cells of the batch,
those at its border too that are not full.
"""

import triton
import triton.language as tl

from .rows import centre_at, normalised


@triton.jit
def reduce_kernel(
    x, mean, changes, norm_weight, norm_bias, weight, bias, scores, out, H, W, HIGH, WIDE, R, eps,
    C: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Cells of SIDE x SIDE tokens by weight (C, SIDE, SIDE, C), HIGH x WIDE of each image.

    Tokens are scored by their ``distance`` from the mean, by their ``activation``, or not at all.
    Those that fill no cell are only scored; a map that fills none is padded to one by zeros.
    """
    across = (W + SIDE - 1) // SIDE
    down = (H + SIDE - 1) // SIDE
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = (cell // (down * across)).to(tl.int64)
    cy = cell // across % down
    cx = cell % across
    c = tl.arange(0, P)
    inside = c < C
    if SCORE == 'distance':
        seen = (cell < R)[:, None] & inside[None, :]
        centre = centre_at(mean, changes, image[:, None] * C + c[None, :], seen, H * W)
    acc = tl.zeros([BLOCK, P], tl.float32)
    for tap in range(SIDE * SIDE):
        ty = cy * SIDE + tap // SIDE
        tx = cx * SIDE + tap % SIDE
        there = (cell < R) & (ty < H) & (tx < W)
        row = image * H * W + ty * W + tx
        seen = there[:, None] & inside[None, :]
        v = tl.load(x + row[:, None] * C + c[None, :], mask=seen, other=0.0).to(tl.float32)
        if SCORE == 'distance':
            apart = tl.where(seen, v - centre, 0.0)
            tl.store(scores + row, tl.sqrt(tl.sum(apart * apart, axis=1)), mask=there)
        if SCORE == 'activation':
            tl.store(scores + row, tl.sum(tl.abs(v), axis=1) / C, mask=there)
        y = normalised(v, norm_weight, norm_bias, c, eps, C)
        w = tl.load(
            weight + (c[None, :] * (SIDE * SIDE) + tap) * C + c[:, None],
            mask=inside[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        # Padding comes after the norm.
        acc = tl.dot(tl.where(seen, y, 0.0).to(w.dtype), w, acc, input_precision='ieee')
    if BIAS:
        acc += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = ((image * HIGH + cy) * WIDE + cx)[:, None] * C + c[None, :]
    full = (cell < R) & (cy < HIGH) & (cx < WIDE)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=full[:, None] & inside[None, :])
