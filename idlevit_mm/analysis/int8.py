"""Linear layers of idle backbones in int8, on the CPU.

Weights are rounded once, a scale for each output; activations in each pass, by their range. That is
what ``torch.ao.quantization.quantize_dynamic`` does, which is deprecated and sees ``nn.Linear``
alone; the operators below it are not, and here they serve all products with weights.

Shape letters: B images, T queries, K keys, C channels, H rows of pixels and W of a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..errors import UsageError
from ..kernels import LINEAR, backend_at, is_plain, split_heads
from ..layers.ffn import MixLayers
from ..losses import shared_copy
from ..policies import Policy
from .models import idle_backbone

_LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer by weights (O, I) in int8: (..., I) to (..., O)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float().flatten(1)
        # An output without weights has a scale as well.
        scales = (weight.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).eps)
        zeros = torch.zeros(len(weight), dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        # Seven bits: two products of eight overflow the sums of processors without VNNI.
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)


class Int8Pointwise(Int8Linear):
    """A convolution of 1 x 1: (B, C, H, W) to (B, O, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Int8Attention(nn.Module):
    """``nn.MultiheadAttention`` for inference, tokens first.

    Its own weights stay, since scorers fold them into a single query.
    """

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        self.in_proj_weight, self.in_proj_bias = attn.in_proj_weight, attn.in_proj_bias
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = zip(weights, biases, strict=True)
        self.projections = nn.ModuleList(Int8Linear(*part) for part in parts)
        self.out_proj = Int8Linear(attn.out_proj.weight, attn.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of (T, B, C) to keys and values (K, B, C), and its head mean (B, T, K)."""
        inputs = (part.transpose(0, 1) for part in (query, key, value))
        query, key, value = (f(x) for f, x in zip(self.projections, inputs, strict=True))
        out = self.out_proj(backend_at(query).attend(query, key, value, self.num_heads))
        weights = None
        if need_weights:
            query, key = split_heads(query, self.num_heads), split_heads(key, self.num_heads)
            logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            weights = logits.softmax(dim=-1).mean(dim=1)
        return out.transpose(0, 1), weights


def in_int8(model: nn.Module) -> nn.Module:
    """A copy of a model, for inference, with the linear layers of its idle backbone in int8.

    Scorers stay as they are, and so do convolutions and patch embeddings.

    Raises:
        TypeError: The model has no idle backbone.
        UsageError: It is not on the CPU.
    """
    clone = shared_copy(model).eval().requires_grad_(False)
    if (device := next(clone.parameters()).device).type != 'cpu':
        raise UsageError(f'int8: the model is on {device}; allowed: cpu')
    _replace(idle_backbone(clone))
    return clone


def _replace(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        if is_plain(child, nn.MultiheadAttention):
            setattr(parent, name, Int8Attention(child))
        elif is_plain(child, *LINEAR):
            setattr(parent, name, Int8Linear(child.weight, child.bias))
        elif isinstance(parent, MixLayers) and is_plain(child, nn.Conv2d) and child.groups == 1:
            setattr(parent, name, Int8Pointwise(child.weight, child.bias))
        elif not isinstance(child, Policy):
            _replace(child)


def _product(x: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return 2 * math.prod(x) * out_shape[-1]


if torch.ops.quantized.linear_dynamic not in flop_registry:
    register_flop_formula(torch.ops.quantized.linear_dynamic)(_product)
