"""Token-wise functions in pieces that stay in the cache.

Shape letters: B images, T tokens, C channels, O channels out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .runtime import eager_on_cpu

# Numbers of the widest intermediate result that are held at a time: 4 MiB in float32.
_CHUNK = 2**20
_MIN_ROWS = 256


def in_chunks(
    function: Callable[[Tensor], Tensor], x: Tensor, width: int, training: bool = False
) -> Tensor:
    """Apply a function of single tokens, on the CPU in inference piece by piece.

    Otherwise hidden features of a large map go through main memory, and fresh memory of that size
    costs more time than the arithmetic.

    Args:
        function: From (B, T, C) to (B, T, O), each token by itself.
        x: (B, T, C).
        width: Channels of the widest intermediate result.
        training: Whether the function draws random numbers, which are those of the whole.

    Returns:
        (B, T, O).
    """
    batch, tokens, channels = x.shape
    most = max(_CHUNK // width, _MIN_ROWS)
    if batch * tokens <= most or not _pays(x, training):
        return function(x)
    pieces = x.reshape(1, -1, channels).split(most, dim=1)
    first = function(pieces[0])
    out = first.new_empty(1, batch * tokens, first.shape[-1])
    for piece, target in zip(pieces, out.split(most, dim=1), strict=True):
        target.copy_(first if piece is pieces[0] else function(piece))
    return out.view(batch, tokens, -1)


def channel_parts(channels: int, pixels: int, x: Tensor, training: bool = False) -> list[slice]:
    """Cut the hidden channels of a large map into parts, where ``in_chunks`` would cut tokens.

    Args:
        channels: Number of hidden channels.
        pixels: Number of pixels of all maps of the batch.
        x: A tensor that lies where they will be.
        training: Whether random numbers are drawn.

    Returns:
        The parts, in order; a single one where cutting does not pay.
    """
    number = -(-channels * pixels // _CHUNK)
    if number == 1 or not _pays(x, training):
        return [slice(0, channels)]
    # Multiples of the vector registers of all processors.
    size = -(-channels // number // 32) * 32
    return [slice(start, min(start + size, channels)) for start in range(0, channels, size)]


def _pays(x: Tensor, training: bool) -> bool:
    return not training and not torch.is_grad_enabled() and eager_on_cpu(x)
