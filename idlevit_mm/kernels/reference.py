"""The reference backend: plain PyTorch with static shapes.

Compilers, exporters and devices without kernels of their own take it. What another backend does
differently it overrides; see ``docs/architecture.md``.

Shape letters: B images, N tokens of the map (H * W), T computed rows, R summaries of idle tokens,
G groups, U units of a group, C channels, O channels out, A heads, K keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Rows, on_device, window_layout
from .convolution import ConvolveRows, depthwise
from .plain import is_plain
from .rows import put_rows, take_rows
from .site import Site, site_of
from .slots import WindowCore, attend_slots, attend_whole_windows, join_heads


class Reference:
    """Everything that a block computes, a method each; all of it is static in shape.

    Attributes:
        name: What ``use_backend`` calls it.
    """

    name = 'reference'

    def why_not(self, site: Site) -> str:
        """In words why the backend cannot be taken in some circumstances; '' if it can."""
        return ''

    # Rows

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        """Gather rows of x (B, S, C): (B, T, C); those of padding are any, and not to be used."""
        return take_rows(x, rows, site_of(x).traced)

    def put(self, x: Tensor, rows: Rows, values: Tensor) -> Tensor:
        """A copy of x (B, S, C) with rows replaced by values (B, T, C); padding is dropped."""
        return put_rows(x, rows, values)

    def overwrite(self, x: Tensor, rows: Rows, values: Tensor) -> Tensor:
        """What ``put`` returns, which may be x itself: nobody else holds it."""
        return self.put(x, rows, values)

    def best(self, scores: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Numbers g * U + u of the best ``counts[g]`` units by scores (B, G, U), ascending.

        Of equal ones the first are taken.
        """
        scores = scores.detach()
        batch, groups, units = scores.shape
        most, total = max(counts), sum(counts)
        # Which of equal units topk takes depends on device and runtime: only its values are read.
        if min(counts) == most:
            limits: Any = most
            least = scores.topk(most, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        else:
            # Groups at the border of the map hold fewer units.
            limits = _count_tables(counts, scores.device).limits[:, None]
            values = scores.topk(most, dim=-1).values
            least = values.gather(-1, (limits - 1).expand(batch, -1, -1))
        above, level = ~(scores <= least), scores == least
        # Not the sum, which OpenVINO 2026.4 gets wrong for all images but the first.
        room = limits - _counted(above)[..., -1:]
        chosen = (above | (level & (_counted(level) <= room))).flatten(1)
        places = _counted(chosen)
        # The place after the last is for whoever is not chosen; of NaN there may be too many.
        places = torch.where(chosen & (places <= total), places - 1, total)
        numbers = torch.arange(groups * units, device=scores.device).expand_as(places)
        return places.new_zeros(batch, total + 1).scatter(1, places, numbers)[:, :total]

    def distance(self, x: Tensor, other: Tensor) -> Tensor:
        """Euclidean distance of tokens x (B, N, C) from one other (B, 1, C): (B, N)."""
        return distance(x, other).squeeze(-1)

    # Layers

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Apply a linear layer: (..., C) to (..., O)."""
        return layer(x)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply weight (O, C), a part of a layer's: (..., C) to (..., O)."""
        return F.linear(x, weight, bias)

    def norm(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Apply a norm to tokens (B, T, C)."""
        if not is_plain(layer, nn.LayerNorm):
            return layer(x)
        return self.layer_norm(x, layer.weight, layer.bias, layer.eps)

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """LayerNorm of tokens (B, T, C) by scale and shift (C,), if there are any."""
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def by_tokens(
        self, function: Callable[[Tensor], Tensor], x: Tensor, width: int, training: bool = False
    ) -> Tensor:
        """Apply a function of single tokens, (B, T, C) to (B, T, O), maybe in parts.

        ``width`` is that of its widest intermediate result; in training it draws random numbers.
        """
        return function(x)

    def channel_parts(self, channels: int, pixels: int, training: bool = False) -> list[slice]:
        """Cut so many independent hidden channels of all pixels of a batch into parts, in order."""
        return [slice(0, channels)]

    def convolve(
        self,
        x: Tensor,
        blank: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        hw_shape: tuple[int, int],
        rows: Rows | None,
        cells: Tensor | None = None,
    ) -> Tensor:
        """Depth-wise convolution of rows x (B, T, C) of a map by weight (C, 1, side, side).

        All rows are there where ``rows`` is None; else blank (B, R, C), or zeros where it is None,
        stand in the other places, ``cells`` (N,) says which of them where R is not 1.
        """
        if rows is None:
            return depthwise(x, weight, bias, hw_shape)
        blank = x.new_zeros(x.shape[0], 1, x.shape[2]) if blank is None else blank
        blank = blank if cells is None else blank[:, cells]
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        site = site_of(x)
        convolve = ConvolveRows.apply if site.grad and not site.traced else ConvolveRows.forward
        return convolve(x, blank, weight, bias, hw_shape, rows)

    # Attention

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, dropout: float = 0.0
    ) -> Tensor:
        """Softmax attention of queries (B, T, C) to keys and values (B, K, C): (B, T, C)."""
        query, key, value = (split_heads(part, num_heads) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return join_heads(out)

    def attend_windows(
        self,
        qkv: Tensor,
        core: WindowCore,
        hw_shape: tuple[int, int],
        shift_size: int,
        rows: Rows | None,
    ) -> Tensor:
        """Attention of packed tokens in windows: (B, T + R, 3 * C) to (B, T + R, C).

        Behind the tokens may be a summary for each window (R). All tokens of the map are there
        where ``rows`` is None.
        """
        sizes = (*hw_shape, core.window_size, shift_size, *(True,) * core.hides_padding)
        layout = window_layout(*sizes, qkv.device)
        if rows is not None and rows.windows is not None:
            return attend_whole_windows(qkv, core, layout, rows)
        return attend_slots(qkv, core, layout, None if rows is None else rows.ids)

    # Whole steps of a block

    def choose(self, block: Any, *args: Any) -> Any | None:
        """Tokens and the rows of a plan of nothing else, for ``look`` and ``planned`` of IdleBlock.

        None to leave it to the block.
        """
        return None

    def attention_half(self, block: Any, *args: Any) -> Any | None:
        """All of ``IdleBlock.attention_half`` at once; None to leave it to the block."""
        return None

    def mlp_half(self, block: Any, *args: Any) -> Any | None:
        """All of ``IdleBlock.mlp_half`` at once; None to leave it to the block."""
        return None


def distance(x: Tensor, other: Tensor) -> Tensor:
    """Euclidean distance of tokens (B, N, C) from (B, 1, C): (B, N, 1)."""
    return torch.linalg.vector_norm(x - other, dim=-1, keepdim=True)


def _counted(mask: Tensor) -> Tensor:
    """How many are True up to each place, that one included: (..., U)."""
    return mask.long().cumsum(dim=-1)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) to (B, A, T, C / A)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class _CountTables(NamedTuple):
    """How many units each group keeps: (G,)."""

    limits: Any


@on_device
def _count_tables(counts: tuple[int, ...]) -> _CountTables:
    return _CountTables(np.array(counts))
