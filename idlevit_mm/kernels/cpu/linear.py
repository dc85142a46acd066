"""Linear layers by oneDNN.

On the CPU PyTorch gives float32 matrices to MKL, which takes its slow path on processors other than
Intel's. oneDNN, which computes its convolutions, is twice as fast there, forward and backward.

Shape letters: I channels in, O channels out.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from ..site import autocasts

# Multiply-adds below which calling it takes longer than is won.
_MIN_PRODUCT = 2**23
# Where PyTorch prefers its own kernel for the gradients of a single image.
_MAX_NATIVE = 20480


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply weight (O, I) to the last dimension, as ``F.linear`` does: (..., I) to (..., O)."""
    grad = torch.is_grad_enabled()
    if not _pays(x, weight, grad):
        return F.linear(x, weight, bias)
    if not grad:
        # A part of a weight whose rows do not lie together would take oneDNN's reference path.
        weight = weight.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    # One image, one pixel wide, in channels-last memory: no copy on either side. With one thread
    # F.conv2d would not choose oneDNN for 1x1 kernels.
    column = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None]
    out = torch.mkldnn_convolution(column, kernel, bias, (0, 0), (1, 1), (1, 1), 1)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _pays(x: Tensor, weight: Tensor, grad: bool) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and (x.numel() > _MAX_NATIVE or not grad)
        and x.numel() * weight.shape[0] >= _MIN_PRODUCT
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not autocasts('cpu')
    )


def _convolution(x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


def _product(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


# PyTorch's counter does not know these, and would take linear layers for free.
for _operation, _formula in (
    (torch.ops.aten.mkldnn_convolution, _convolution),
    (torch.ops.mkldnn._linear_pointwise, _product),
):
    if _operation not in flop_registry:
        register_flop_formula(_operation)(_formula)
