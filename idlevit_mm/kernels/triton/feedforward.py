"""Kernels of feed-forward networks.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, R = B * K packed
rows, C hidden channels.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """The exact form, by the error function."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


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
    y = gelu(acc).to(out.dtype.element_ty)
    tl.store(out + at, y, mask=there[:, None] & inside[None, :])
