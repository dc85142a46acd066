"""The backend of the CPU: shapes may follow from values, and memory is what costs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...ops import Rows
from ..plain import LINEAR, is_plain
from ..reference import Reference, distance
from ..rows import take_rows
from ..site import Site
from ..slots import WindowCore
from . import attention, linear, native, pieces


class CPU(Reference):
    """Eager CPU: oneDNN's products, kernels in C on packed rows, pieces in the cache."""

    name = 'cpu'

    def why_not(self, site: Site) -> str:
        if site.device != 'cpu':
            return f'the tokens lie on {site.device}'
        return '' if site.eager else 'shapes must not follow from values while a graph is recorded'

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        return take_rows(x, rows)

    def put(self, x: Tensor, rows: Rows, values: Tensor) -> Tensor:
        if x.dtype == torch.float32 and native.usable(x):
            return native.put(x.clone(memory_format=torch.contiguous_format), rows, values)
        return super().put(x, rows, values)

    def overwrite(self, x: Tensor, rows: Rows, values: Tensor) -> Tensor:
        in_place = x.dtype == torch.float32 and x.is_contiguous() and native.usable(x)
        return native.put(x, rows, values) if in_place else self.put(x, rows, values)

    def best(self, scores: Tensor, counts: tuple[int, ...]) -> Tensor:
        # Which are best has no gradient.
        if len(counts) > 1 or not native.usable(scores, grad=True):
            return super().best(scores, counts)
        return native.best(scores.detach(), counts[0])

    def distance(self, x: Tensor, other: Tensor) -> Tensor:
        if native.usable(x):
            return native.distance(x, other)
        parts = [
            self.by_tokens(partial(distance, other=one), image, x.shape[-1])
            for image, one in zip(x.split(1), other.split(1), strict=True)
        ]
        return torch.cat(parts).squeeze(-1)

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not is_plain(layer, *LINEAR):
            return layer(x)
        return linear.product(x, layer.weight, layer.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear.product(x, weight, bias)

    def by_tokens(
        self, function: Callable[[Tensor], Tensor], x: Tensor, width: int, training: bool = False
    ) -> Tensor:
        whole = training or torch.is_grad_enabled()
        return function(x) if whole else pieces.in_pieces(function, x, width)

    def channel_parts(self, channels: int, pixels: int, training: bool = False) -> list[slice]:
        whole = training or torch.is_grad_enabled()
        return [slice(0, channels)] if whole else pieces.channel_parts(channels, pixels)

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
        if rows is None or not native.usable(x):
            return super().convolve(x, blank, weight, bias, hw_shape, rows, cells)
        return native.convolve(x, blank, weight, bias, hw_shape, rows, cells)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, dropout: float = 0.0
    ) -> Tensor:
        if dropout or not attention.pays(query, key):
            return super().attend(query, key, value, num_heads, dropout)
        return attention.attend(query, key, value, num_heads)

    def attend_windows(
        self,
        qkv: Tensor,
        core: WindowCore,
        hw_shape: tuple[int, int],
        shift_size: int,
        rows: Rows | None,
    ) -> Tensor:
        if not native.attends(qkv, core):
            return super().attend_windows(qkv, core, hw_shape, shift_size, rows)
        return native.attend_windows(qkv, core, hw_shape, shift_size, rows)
