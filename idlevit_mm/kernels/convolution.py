"""Depth-wise convolution of some rows of a map.

Shape letters: B images, N tokens of the map (H * W), T computed rows, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import Rows, to_map, to_tokens
from .rows import fill_map, take_rows


def depthwise(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, hw_shape: tuple[int, int]
) -> Tensor:
    """Convolve all tokens (B, N, C) of a map by weight (C, 1, side, side)."""
    padding = weight.shape[-1] // 2
    out = F.conv2d(to_map(tokens, hw_shape), weight, bias, padding=padding, groups=len(weight))
    return to_tokens(out)


class ConvolveRows(torch.autograd.Function):
    """Depth-wise convolution that keeps the computed rows for the backward pass, not their map."""

    @staticmethod
    def forward(
        x: Tensor,
        blank: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hw_shape: tuple[int, int],
        rows: Rows,
    ) -> Tensor:
        """Convolve x (B, T, C) among a map of blank (B, 1, C), or (B, N, C): (B, T, C)."""
        canvas = fill_map(blank, hw_shape[0] * hw_shape[1], rows, x)
        return take_rows(depthwise(canvas, weight, bias, hw_shape), rows, traced=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, blank, weight, bias, ctx.hw_shape, rows = inputs
        ctx.save_for_backward(x, blank, weight, rows.ids)
        ctx.has_bias = bias is not None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, blank, weight, ids = ctx.saved_tensors
        hw_shape, rows = ctx.hw_shape, Rows(ids)
        num_tokens = hw_shape[0] * hw_shape[1]
        canvas = fill_map(blank, num_tokens, rows, x)
        nothing = torch.zeros_like(blank[:, :1])
        grad_map = fill_map(nothing, num_tokens, rows, grad)
        channels, padding = len(weight), weight.shape[-1] // 2
        grad_canvas, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            to_map(grad_map, hw_shape),
            to_map(canvas, hw_shape),
            weight,
            [channels],
            stride=[1, 1],
            padding=[padding, padding],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=channels,
            output_mask=[True, True, ctx.has_bias],
        )
        grad_canvas = to_tokens(grad_canvas)
        grad_x = take_rows(grad_canvas, rows)
        grad_blank = None
        if ctx.needs_input_grad[1]:
            grad_blank = fill_map(grad_canvas, num_tokens, rows, torch.zeros_like(grad_x))
            grad_blank = grad_blank.sum_to_size(blank.shape)
        return grad_x, grad_blank, grad_weight, grad_bias, None, None
