"""The kernels as operators of PyTorch, static in shape, with what each one moves.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, C channels, A
heads, M windows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from . import TRAFFIC, feedforward, rows, windows

# Numbers of a tile of rows.
_TILE = 4096


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return triton.knobs.runtime.interpret


def _mend_interpreter() -> None:
    """Let loops have bounds that were loaded: numpy 2.4 makes no int of an array of one number."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended


if interpreted():
    _mend_interpreter()


def size(*tensors: Tensor | None) -> int:
    """Bytes of some tensors."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _operator(
    fake: Callable[..., Any],
    traffic: Callable[..., tuple[int, int]] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function, what shapes it returns, and what it moves."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f'idlevit_mm::{function.__name__}'
        operator = custom_op(name, function, mutates_args=mutates)
        operator.register_fake(fake)
        if traffic is not None:
            TRAFFIC[name] = traffic
        return operator

    return made


def _on(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device."""
    if x.device.type != 'cuda' or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _tiles(channels: int) -> dict[str, int]:
    padded = triton.next_power_of_2(channels)
    return dict(C=channels, P=padded, BLOCK=max(_TILE // padded, 1), num_warps=4)


def _padded(hw_shape: list[int], window: int) -> tuple[int, int]:
    """Sides of the map in whole windows."""
    height, width = (-(-side // window) * window for side in hw_shape)
    return height, width


def _windows(hw_shape: list[int], window: int) -> int:
    height, width = _padded(hw_shape, window)
    return (height // window) * (width // window)


# Scores and choice


def _new_scores(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _look(x: Tensor, mean: Tensor | None, normed: Tensor | None, *norm: Any) -> Tensor:
    scores = _new_scores(x)
    (batch, tokens, _), tiles = x.shape, _tiles(x.shape[2])
    weight, bias, eps = norm or (x, x, 0.0)
    with _on(x):
        rows.look_kernel[(triton.cdiv(tokens, tiles['BLOCK']), batch)](
            *(x, x if mean is None else mean, weight, bias, scores),
            *(x if normed is None else normed, tokens, eps),
            **dict(tiles, DISTANCE=mean is not None, NORM=normed is not None),
        )
    return scores


@_operator(_new_scores)
def score_rows(x: Tensor, mean: Tensor | None) -> Tensor:
    """Distance of tokens (B, N, C) from mean (B, C), or their mean activation: (B, N)."""
    return _look(x, mean, None)


@_operator(lambda x, *_: (_new_scores(x), torch.empty_like(x)))
def score_norm(
    x: Tensor, mean: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``score_rows``, and the LayerNorm of all tokens: (B, N), (B, N, C)."""
    normed = torch.empty_like(x)
    return _look(x, mean, normed, weight, bias, eps), normed


def _chosen(
    scores: Tensor, count: int, hw_shape: list[int], window: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch = scores.shape[0]
    return (
        scores.new_empty(batch, count, dtype=torch.int64),
        scores.new_empty(batch * _windows(hw_shape, window) + 1, dtype=torch.int32),
        scores.new_empty(scores.shape, dtype=torch.int32),
    )


@_operator(_chosen)
def select(
    scores: Tensor, count: int, hw_shape: list[int], window: int, shift: int, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` best tokens of each image by scores (B, N), in the order of windows.

    Where there are starts (M + 1,), the best of each window, so many as lie between two of them.
    Their ids (B, K); where the packed rows of each window of the batch begin (B * M + 1,); and the
    packed row of each token, -1 for idle ones (B, N).
    """
    out = _chosen(scores, count, hw_shape, window)
    (batch, tokens), side = scores.shape, triton.next_power_of_2(window**2)
    sizes = *out, tokens, count, *hw_shape, *_padded(hw_shape, window)
    block = min(max(triton.next_power_of_2(tokens), 128), _TILE)
    layout = dict(WS=window, SHIFT=shift)
    with _on(scores):
        if starts is not None:
            grid = _windows(hw_shape, window), batch
            kernel = rows.select_in_windows_kernel[grid]
            kernel(scores, starts, *sizes, **layout, SLOTS=side, num_warps=1)
        else:
            warps = max(block // 256, 1)
            rows.select_kernel[(batch,)](scores, *sizes, **layout, BLOCK=block, num_warps=warps)
    return out


# Rows


def _rows(x: Tensor, ids: Tensor | None, branch: Tensor | None, *norm: Any) -> tuple[Tensor, ...]:
    """Rows of x plus a branch, and their norm; x in place of what is not asked for."""
    (batch, tokens, channels), tiles = x.shape, _tiles(x.shape[2])
    count = tokens if ids is None else ids.shape[1]
    keep = not norm or branch is not None
    now = x.new_empty(batch, count, channels) if keep else x
    normed = x.new_empty(batch, count, channels) if norm else x
    weight, bias, eps = norm or (x, x, 0.0)
    with _on(x):
        rows.rows_kernel[(triton.cdiv(batch * count, tiles['BLOCK']),)](
            *(x, x if ids is None else ids, x if branch is None else branch, weight, bias),
            *(now, normed, tokens, count, batch * count, eps),
            **dict(tiles, GATHER=ids is not None, ADD=branch is not None),
            **dict(KEEP=keep, NORM=bool(norm)),
        )
    return now, normed


def _gathered(x: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*ids.shape, x.shape[2])


def _gather_traffic(x: Tensor, ids: Tensor, *norm: Any) -> tuple[int, int]:
    moved = ids.numel() * x.shape[2] * x.element_size()
    return moved + size(ids, *norm[:2]), moved


@_operator(_gathered, _gather_traffic)
def gather(x: Tensor, ids: Tensor) -> Tensor:
    """Rows (B, K) of x (B, N, C): (B, K, C)."""
    return _rows(x, ids, None)[0]


@_operator(_gathered, _gather_traffic)
def gather_norm(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of rows (B, K) of x (B, N, C): (B, K, C)."""
    return _rows(x, ids, None, weight, bias, eps)[1]


@_operator(
    lambda x, ids, branch, *_: (torch.empty_like(branch), torch.empty_like(branch)),
    lambda x, ids, branch, *norm: (2 * size(branch) + size(ids, *norm[:2]), 2 * size(branch)),
)
def add_norm(
    x: Tensor, ids: Tensor | None, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows (B, K) of x (B, N, C), all where there are no ids, plus a branch; and their norm."""
    now, normed = _rows(x, ids, branch, weight, bias, eps)
    return now, normed


@_operator(lambda *_: None, lambda x, ids, now, branch: (size(ids, now, branch), size(now)), ('x',))
def put_rows(x: Tensor, ids: Tensor, now: Tensor, branch: Tensor) -> None:
    """Write packed rows (B, K, C) plus their branch to their places (B, K) in x (B, N, C)."""
    tiles, count = _tiles(x.shape[2]), ids.numel()
    with _on(x):
        rows.put_kernel[(triton.cdiv(count, tiles['BLOCK']),)](
            x, ids, now, branch, x.shape[1], ids.shape[1], count, **tiles
        )


@_operator(
    lambda x, *_: torch.empty_like(x),
    # Active rows come from the pack, the others from x.
    lambda x, places, now, branch: (size(x, places, branch), size(x)),
)
def merge_rows(x: Tensor, places: Tensor, now: Tensor, branch: Tensor) -> Tensor:
    """As ``put_rows`` to a copy of x, by the packed row of each token (B, N)."""
    out, tiles, count = torch.empty_like(x), _tiles(x.shape[2]), places.numel()
    with _on(x):
        rows.merge_kernel[(triton.cdiv(count, tiles['BLOCK']),)](
            x, places, now, branch, out, count, **tiles
        )
    return out


# Layers


@_operator(lambda qkv, *_: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3))
def window_attention(
    qkv: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
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
    padded, number = _padded(hw_shape, window), _windows(hw_shape, window)
    with _on(qkv):
        windows.attention_kernel[(batch * number * num_heads,)](
            *(qkv, qkv if ids is None else ids, qkv if offsets is None else offsets),
            *(table, blank, out, *hw_shape, *padded, number, scale),
            **dict(A=num_heads, D=width // 3 // num_heads, WS=window, SHIFT=shift),
            **dict(PADDED=padded != tuple(hw_shape), DENSE=ids is None),
            **dict(BLOCK_M=16, BLOCK_N=16, num_warps=1),
        )
    return out


@_operator(lambda x, *_: torch.empty_like(x))
def convolve_gelu(
    x: Tensor,
    ids: Tensor | None,
    places: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    hw_shape: list[int],
) -> Tensor:
    """GELU of a depth-wise convolution by weight (C, 1, 3, 3) of rows, or of all: (B, K, C)."""
    batch, count, channels = x.shape
    out, block, width = torch.empty_like(x), 32, min(triton.next_power_of_2(channels), 64)
    with _on(x):
        feedforward.convolve_kernel[
            (triton.cdiv(batch * count, block), triton.cdiv(channels, width))
        ](
            *(x, x if ids is None else ids, x if places is None else places, weight),
            *(x if bias is None else bias, out, *hw_shape, count, batch * count),
            **dict(C=channels, BLOCK=block, BLOCK_C=width, PACKED=ids is not None),
            **dict(HAS_BIAS=bias is not None, num_warps=4),
        )
    return out
