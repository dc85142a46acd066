"""The kernels as operators of PyTorch, static in shape, with what each one moves.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, C channels, A
heads, M windows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor

from ..operators import operator
from . import rows, selection, windows

_Maybe: TypeAlias = Tensor | None
# Numbers of a tile of rows.
_TILE = 4096
# Tokens of an image that ``select`` can count, which has 21 bits for them.
MOST_TOKENS = 2**21 - 1
# Tokens of an image from which its packing, not its cut, is done by several programs.
_MANY = 2**13
# Scores that a program looks at together, and slots of windows that it packs.
_SCORES, _SLOTS = 8192, 4096
CONVOLUTION_TILES = dict(BLOCK=32, BLOCK_C=64, num_warps=4)


# Whether kernels run in Triton's interpreter, on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)


if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _mended(tensor: Any, scope: Any) -> None:
        """Loops may have bounds that were loaded: numpy 2.4 makes no int of such an array."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _mended


def size(*tensors: Tensor | None) -> int:
    """Bytes of some tensors."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _on(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device."""
    if x.device.type != 'cuda' or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _tiles(channels: int) -> dict[str, int]:
    padded = triton.next_power_of_2(channels)
    return dict(C=channels, P=padded, BLOCK=max(_TILE // padded, 1), num_warps=4)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _layout(hw_shape: list[int], window: int) -> tuple[int, int, int]:
    """Sides of the map in whole windows, in tokens, and the number of windows."""
    height, width = (-(-side // window) for side in hw_shape)
    return height * window, width * window, height * width


# Scores and choice


# Tiles of tokens that a program adds up.
_STEPS = 8


@operator(lambda *_: None, lambda x, sums: (size(x, sums), size(sums)), ('sums',))
def add_up(x: Tensor, sums: Tensor) -> None:
    """Add tokens (B, N, C) to sums (B, C), which ``score_norm`` takes for changes of the mean."""
    tiles = _tiles(x.shape[2])
    with _on(x):
        rows.sum_kernel[(triton.cdiv(x.shape[1], tiles['BLOCK'] * _STEPS), len(x))](
            x, sums, x.shape[1], STEPS=_STEPS, **tiles
        )


def _looked(x: Tensor, mean: _Maybe, changes: _Maybe, weight: _Maybe, *_: Any) -> list[Tensor]:
    scores = x.new_empty(x.shape[:2], dtype=torch.float32)
    return [scores] if weight is None else [scores, torch.empty_like(x)]


@operator(_looked)
def score_norm(
    x: Tensor, mean: _Maybe, changes: _Maybe, weight: _Maybe, bias: _Maybe, eps: float
) -> list[Tensor]:
    """Scores (B, N) of tokens (B, N, C), and with weights of a LayerNorm their norm (B, N, C).

    A score is the distance from mean (B, C), which has changed since by what ``add_branch`` has
    counted (B, C), without it the mean activation.
    """
    out, (batch, tokens, _) = _looked(x, mean, changes, weight), x.shape
    tiles = _tiles(x.shape[2])
    with _on(x):
        rows.look_kernel[(triton.cdiv(tokens, tiles['BLOCK']), batch)](
            *(x, _or(mean, x), _or(changes, x), _or(weight, x), _or(bias, x)),
            *(out[0], out[-1], tokens, eps),
            **dict(tiles, DISTANCE=mean is not None, NORM=weight is not None),
        )
    return out


def _chosen(
    scores: Tensor, count: int, hw_shape: list[int], window: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch = scores.shape[0]
    return (
        scores.new_empty(batch, count, dtype=torch.int64),
        scores.new_empty(batch * _layout(hw_shape, window)[2] + 1, dtype=torch.int32),
        scores.new_empty(scores.shape, dtype=torch.int32),
    )


@operator(_chosen)
def select(
    scores: Tensor, count: int, hw_shape: list[int], window: int, shift: int, starts: _Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` best tokens of each image by scores (B, N), in the order of windows.

    Where there are starts (M + 1,), the best of each window, so many as lie between two of them.
    Their ids (B, K); where the packed rows of each window of the batch begin (B * M + 1,); and the
    packed row of each token, -1 for idle ones (B, N).
    """
    out = _chosen(scores, count, hw_shape, window)
    (batch, tokens), side = scores.shape, triton.next_power_of_2(window**2)
    *padded, number = _layout(hw_shape, window)
    sizes = *out, tokens, count, *hw_shape, *padded
    block = min(max(triton.next_power_of_2(tokens), 128), _SCORES)
    cut = dict(BLOCK=block, num_warps=max(block // 512, 1))
    layout = dict(WS=window, SHIFT=shift)
    with _on(scores):
        if starts is not None:
            kernel = selection.select_in_windows_kernel[(number, batch)]
            bits = 32 + side.bit_length()
            kernel(scores, starts, *sizes, **layout, SLOTS=side, BITS=bits, num_warps=1)
        elif tokens < _MANY:
            tiles = dict(layout, SLOTS=min(block, _SLOTS))
            selection.select_kernel[(batch,)](scores, *sizes, **tiles, **cut)
        else:
            known = scores.new_empty(2 * batch, dtype=torch.int32)
            selection.cut_kernel[(batch,)](scores, known, tokens, count, **cut)
            parts = triton.cdiv(padded[0] * padded[1], _SLOTS), batch
            tiles = dict(layout, BLOCK=_SLOTS, num_warps=max(_SLOTS // 256, 1))
            selection.pack_kernel[parts](scores, known, *sizes, **tiles)
    return out


# Rows


def _taken(x: Tensor, ids: _Maybe, *_: Any) -> Tensor:
    return x.new_empty(x.shape if ids is None else (*ids.shape, x.shape[2]))


def _take_traffic(x: Tensor, ids: _Maybe, branch: _Maybe, *norm: Any) -> tuple[int, int]:
    moved = size(_taken(x, ids))
    return moved + size(ids, branch, *norm[:2]), moved


@operator(_taken, _take_traffic)
def take_norm(
    x: Tensor, ids: _Maybe, branch: _Maybe, weight: _Maybe, bias: _Maybe, eps: float
) -> Tensor:
    """Rows (B, K) of x (B, N, C), all where there are no ids, maybe plus a branch: (B, K, C).

    With weights of a LayerNorm the norm of that. x may be a map (B, C, N) turned around, of which
    all is taken.
    """
    out, tiles = _taken(x, ids), _tiles(x.shape[2])
    total, turned = out.shape[:2].numel(), not x.is_contiguous()
    # All images may share the ids of one.
    ids = None if ids is None else ids.contiguous()
    with _on(x):
        rows.rows_kernel[(triton.cdiv(total, tiles['BLOCK']),)](
            *(x, _or(ids, x), _or(branch, x), _or(weight, x), _or(bias, x), out),
            *(x.shape[1], out.shape[1], total, eps),
            **dict(tiles, GATHER=ids is not None, ADD=branch is not None, NORM=weight is not None),
            TURNED=turned,
        )
    return out


def put(
    x: _Maybe, where: Tensor, now: _Maybe, branch: _Maybe, out: Tensor, changes: _Maybe = None
) -> Tensor:
    """Launch what puts rows to places in x, or in a copy of it, which is ``out``.

    In a copy rows that are not given, those of x or those now, are zeros.
    """
    tiles, sizes = _tiles(out.shape[2]), (out.shape[1], where.shape[1], where.numel())
    with _on(out):
        rows.put_kernel[(triton.cdiv(where.numel(), tiles['BLOCK']),)](
            *(_or(x, out), where, _or(now, out), _or(branch, out), out, _or(changes, out), *sizes),
            **dict(tiles, COPY=out is not x, IDLE=x is not None, ACTIVE=now is not None),
            **dict(ADD=branch is not None, COUNT=changes is not None),
        )
    return out


# Active rows come from the pack, the others from x.
@operator(
    lambda x, *_: x.new_empty(x.shape),
    lambda x, places, now, branch: (size(x, places, branch), size(x)),
)
def merge_rows(x: Tensor, places: Tensor, now: Tensor, branch: _Maybe) -> Tensor:
    """A copy of x (B, N, C) with packed rows (B, K, C), maybe plus their branch, in their places.

    Places (B, N) are the packed row of each token, -1 for idle ones.
    """
    return put(x, places, now, branch, x.new_empty(x.shape))


# Layers


def _attention_flops(
    qkv: Tensor,
    ids: _Maybe,
    offsets: _Maybe,
    table: Tensor,
    blank: Tensor,
    hw_shape: list[int],
    window: int,
    *_: Any,
    **__: Any,
) -> int:
    number = qkv.shape[0] * _layout(hw_shape, window)[2]
    pairs = number * window**4
    if offsets is not None and type(offsets) is Tensor:
        pairs = int(offsets.diff().long().square().sum())
    elif offsets is not None:  # without values, as if windows were alike
        pairs = qkv.shape[:2].numel() ** 2 // number
    return 4 * pairs * (qkv.shape[2] // 3)


def window_constants(
    qkv: Tensor, ids: _Maybe, window: int, shift: int, num_heads: int, padded: bool
) -> dict[str, Any]:
    """What the kernels of attention in windows are compiled with."""
    depth = qkv.shape[2] // 3 // num_heads
    return dict(A=num_heads, D=depth, WS=window, SHIFT=shift, PADDED=padded, DENSE=ids is None)


def attention_tiles(dense: bool, depth: int, window: int) -> dict[str, int]:
    """The fastest of ten on an H100, for windows of 49 slots, that spill nowhere."""
    if dense and depth <= 64 and window <= 8:
        return dict(BLOCK_M=64, BLOCK_N=32, num_warps=4)
    return dict(BLOCK_M=16, BLOCK_N=16, num_warps=max(depth // 64, 1))


@operator(lambda qkv, *_: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3), flops=_attention_flops)
def window_attention(
    qkv: Tensor,
    ids: _Maybe,
    offsets: _Maybe,
    table: Tensor,
    blank: Tensor,
    hw_shape: list[int],
    window: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Attention in windows of packed rows (B, K, 3 * C), or of whole maps: (B, K, C)."""
    batch, count, width = qkv.shape
    out = qkv.new_empty(batch, count, width // 3)
    *padded, number = _layout(hw_shape, window)
    constants = window_constants(qkv, ids, window, shift, num_heads, padded != list(hw_shape))
    with _on(qkv):
        windows.attention_kernel[(batch * number * num_heads,)](
            *(qkv, _or(ids, qkv), _or(offsets, qkv)),
            *(table, blank, out, out, *hw_shape, *padded, number, scale),
            **dict(constants, TRAINS=False, **attention_tiles(ids is None, constants['D'], window)),
        )
    return out


@operator(lambda x, *_: torch.empty_like(x), flops=lambda x, *_, **__: 18 * x.numel())
def convolve_gelu(
    x: Tensor, ids: _Maybe, places: _Maybe, weight: Tensor, bias: _Maybe, hw_shape: list[int]
) -> Tensor:
    """GELU of a depth-wise convolution by weight (C, 1, 3, 3) of rows, or of all: (B, K, C)."""
    batch, count, channels = x.shape
    out, tiles = torch.empty_like(x), dict(CONVOLUTION_TILES)
    tiles['BLOCK_C'] = min(triton.next_power_of_2(channels), tiles['BLOCK_C'])
    parts = triton.cdiv(batch * count, tiles['BLOCK']), triton.cdiv(channels, tiles['BLOCK_C'])
    with _on(x):
        rows.convolve_kernel[parts](
            *(x, _or(ids, x), _or(places, x), weight),
            *(_or(bias, x), out, *hw_shape, count, batch * count),
            **dict(tiles, C=channels, PACKED=ids is not None, HAS_BIAS=bias is not None),
        )
    return out
