"""Functions of tokens and of channels in pieces that stay in the cache.

Otherwise hidden features of a large map go through main memory, and fresh memory of that size
costs more time than the arithmetic.

Shape letters: B images, T tokens, C channels, O channels out.
"""

from collections.abc import Callable

from torch import Tensor

# Numbers of the widest intermediate result that are held at a time: 4 MiB in float32.
_PIECE = 2**20
_MIN_ROWS = 256


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """Apply a function of single tokens, (B, T, C) to (B, T, O), piece by piece.

    ``width`` is that of its widest intermediate result.
    """
    batch, tokens, channels = x.shape
    most = max(_PIECE // width, _MIN_ROWS)
    if batch * tokens <= most:
        return function(x)
    pieces = x.reshape(1, -1, channels).split(most, dim=1)
    first = function(pieces[0])
    out = first.new_empty(1, batch * tokens, first.shape[-1])
    for piece, target in zip(pieces, out.split(most, dim=1), strict=True):
        target.copy_(first if piece is pieces[0] else function(piece))
    return out.view(batch, tokens, -1)


def channel_parts(channels: int, pixels: int) -> list[slice]:
    """Cut hidden channels of all pixels of a batch into parts, one where cutting does not pay."""
    number = -(-channels * pixels // _PIECE)
    if number == 1:
        return [slice(0, channels)]
    # Multiples of the vector registers of all processors.
    size = -(-channels // number // 32) * 32
    return [slice(start, min(start + size, channels)) for start in range(0, channels, size)]
