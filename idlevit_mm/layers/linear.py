"""Linear layers that are as fast on the CPU as convolutions.

Shape letters: I channels in, O channels out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from ..ops import eager_on_cpu

# Multiply-adds below which making the views takes longer than is won.
_MIN_PRODUCT = 2**23
# Where PyTorch prefers its own kernel for the gradients of a single image.
_MAX_NATIVE = 20480


class Linear(nn.Linear):
    """``nn.Linear`` by way of ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map to the last dimension, as ``F.linear`` does.

    On the CPU PyTorch gives float32 matrices to MKL, which takes its slow path on processors other
    than Intel's, but 1x1 convolutions to oneDNN, which is twice as fast there, forward and
    backward, and no slower elsewhere.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    if not _by_convolution(x, weight):
        return F.linear(x, weight, bias)
    # One image, one pixel wide, in channels-last memory: no copy on either side.
    column = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = _convolve(column, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not eager_on_cpu(x):
        return F.conv2d(x, weight, bias)
    # With one thread F.conv2d would not choose oneDNN for 1x1 kernels.
    return torch.mkldnn_convolution(x, weight, bias, (0, 0), (1, 1), (1, 1), 1)


def _by_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        # Exported graphs hold matrix products, as everybody expects.
        not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and (x.numel() > _MAX_NATIVE or not torch.is_grad_enabled())
        and x.numel() * weight.shape[0] >= _MIN_PRODUCT
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled('cpu')
    )


def _operations(x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


# PyTorch's counter knows convolutions by other names only, and would take linear layers for free.
if torch.ops.aten.mkldnn_convolution not in flop_registry:
    register_flop_formula(torch.ops.aten.mkldnn_convolution)(_operations)
