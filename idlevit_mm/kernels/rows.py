"""Moving rows of a sequence of tokens out and back.

Shape letters: B images, S rows of x, C channels, T computed rows, N tokens of the map.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Rows


def take_rows(x: Tensor, rows: Rows, traced: bool = False) -> Tensor:
    """Gather rows of x (B, S, C): (B, T, C); those of padding are any and must not be used.

    A graph that is ``traced`` holds no function of our own.
    """
    own = torch.is_grad_enabled() and not traced
    take = _TakeRows.apply if own else _TakeRows.forward
    flat = take(x.flatten(0, 1), flat_ids(rows, x.shape[1]), rows.padded)
    return flat.view(*rows.ids.shape, -1)


def put_rows(x: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """Copy x (B, S, C) with rows replaced by values (B, T, C); the inverse of ``take_rows``.

    Values of padding are dropped; other rows are bit-identical to those of x.
    """
    flat = x.flatten(0, 1)
    written = F.pad(flat, (0, 0, 0, 1)) if rows.padded else flat
    ids = flat_ids(rows, x.shape[1])
    written = written.index_copy(0, ids, values.flatten(0, 1).to(x.dtype))
    return written[: flat.shape[0]].view(x.shape)


def fill_map(blank: Tensor, num_tokens: int, rows: Rows, values: Tensor) -> Tensor:
    """A map of blank (B, 1, C), or (B, N, C), and rows (B, T, C) of no padding: (B, N, C)."""
    filled = blank.expand(-1, num_tokens, -1).clone(memory_format=torch.contiguous_format)
    ids = flat_ids(rows, num_tokens)
    return filled.flatten(0, 1).index_copy_(0, ids, values.flatten(0, 1)).view(filled.shape)


def flat_ids(rows: Rows, num_rows: int) -> Tensor:
    """Row numbers in the flattened (B * S, C) sequence, B * S for padding: (B * T,)."""
    batch, ids = rows.ids.shape[0], rows.ids
    # A trace of one image is run on several.
    if batch > 1 or torch.jit.is_tracing():
        ids = ids + torch.arange(batch, device=ids.device)[:, None] * num_rows
    if rows.padded:
        ids = torch.where(rows.ids < 0, batch * num_rows, ids)
    return ids.flatten()


class _TakeRows(torch.autograd.Function):
    """index_select over distinct rows, whose backward copies rows instead of adding them.

    Autograd's own backward is an index_add, several times slower on the CPU and not deterministic
    on a GPU. The row after the last stands for padding: it reads any row and gives no gradient.
    """

    @staticmethod
    def forward(flat: Tensor, ids: Tensor, padded: bool) -> Tensor:
        return flat.index_select(0, ids.clamp(max=flat.shape[0] - 1) if padded else ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        flat, ids, ctx.padded = inputs
        ctx.save_for_backward(ids)
        ctx.num_rows = flat.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        full = grad.new_zeros(ctx.num_rows + int(ctx.padded), grad.shape[1])
        return full.index_copy(0, ids, grad)[: ctx.num_rows], None, None
