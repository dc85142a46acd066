"""Feed-forward networks on packed tokens: Swin's and ViT's, and those of PVT, PVTv2 and MiT."""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.transformer import FFN
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import Selection, channel_parts, fill_map, take_tokens
from .linear import linear
from .shape import to_map, to_tokens


class FeedForward(FFN):
    """mmcv's two-layer feed-forward network by way of ``linear``."""

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """Compute the branch, with identity where the module adds it."""
        (first, act, drop), second, last_drop = self.layers
        hidden = drop(act(linear(x, first.weight, first.bias)))
        out = self.dropout_layer(self.gamma2(last_drop(linear(hidden, second.weight, second.bias))))
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out


class MixFFN(BaseModule):
    """PVT's feed-forward network, with a 3x3 depth-wise convolution in PVTv2 (2106.13797) and MiT.

    Hidden features of idle tokens are not computed: the convolution sees zeros in their places, or
    those of their summary where there is one. The summary itself has no place in the map; it is
    convolved as if all its neighbours were like it, which is what it stands for.

    Args:
        embed_dims: Channels of the tokens.
        feedforward_channels: Channels of the hidden layer.
        act_cfg: Activation.
        ffn_drop: Dropout after the activation and after the second layer.
        drop_path_rate: Stochastic depth of the branch.
        use_conv: Whether the depth-wise convolution is there.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        act_cfg: dict,
        ffn_drop: float = 0.0,
        drop_path_rate: float = 0.0,
        use_conv: bool = False,
    ) -> None:
        super().__init__()
        hidden = feedforward_channels
        drop = nn.Dropout(ffn_drop)
        layers = [
            nn.Conv2d(embed_dims, hidden, 1),
            build_activation_layer(act_cfg),
            drop,
            nn.Conv2d(hidden, embed_dims, 1),
            drop,
        ]
        if use_conv:
            layers.insert(1, nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.use_conv = use_conv
        self.layers = Sequential(*layers)
        self.dropout_layer = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(self, x: Tensor, hw_shape: tuple[int, int], selection: Selection | None) -> Tensor:
        """Compute the branch, without the identity.

        Args:
            x: (B, T, C), the active tokens; all N of them where ``selection`` is None;
                (B, T + 1, C) with a summary of the idle tokens.
            hw_shape: Height and width of the map in tokens.
            selection: Which tokens of the map are active.
        """
        hidden = self.layers[0].out_channels
        if not self.use_conv:
            return self.dropout_layer(self._part(x, hw_shape, selection, slice(0, hidden)))
        # Channels of the convolution are independent: a large map is never there as a whole.
        numbers = x.shape[0] * hw_shape[0] * hw_shape[1]
        first, *others = channel_parts(hidden, numbers, x, self.training)
        out = self._part(x, hw_shape, selection, first)
        for part in others:
            out += self._part(x, hw_shape, selection, part)
        return self.dropout_layer(out)

    def _part(
        self, x: Tensor, hw_shape: tuple[int, int], selection: Selection | None, part: slice
    ) -> Tensor:
        """What the hidden channels of a part add to the output; the first part brings the bias."""
        first, *depthwise, act, drop, second, _ = self.layers
        x = linear(x, first.weight.flatten(1)[part], _of(first.bias, part))
        for conv in depthwise:
            x = _convolve(x, conv.weight[part], _of(conv.bias, part), hw_shape, selection)
        bias = second.bias if part.start == 0 else None
        return drop(linear(drop(act(x)), second.weight.flatten(1)[:, part], bias))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hw_shape: tuple[int, int],
    selection: Selection | None,
) -> Tensor:
    """Depth-wise convolution of the active tokens among the map."""
    if selection is None:
        return _depthwise(x, weight, bias, hw_shape)
    num_active = selection.token_ids.shape[1]
    x, summaries = x[:, :num_active], x[:, num_active:]
    # Idle tokens are like their summary, where there is one.
    blank = summaries if summaries.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    out = _ConvolveActive.apply(x, blank, weight, bias, hw_shape, selection)
    if summaries.shape[1]:
        alike = summaries * weight.sum(dim=(1, 2, 3)) + (0.0 if bias is None else bias)
        out = torch.cat([out, alike], dim=1)
    return out


class _ConvolveActive(torch.autograd.Function):
    """Depth-wise convolution that keeps the active tokens for the backward pass, not their map."""

    @staticmethod
    def forward(
        x: Tensor,
        blank: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hw_shape: tuple[int, int],
        selection: Selection,
    ) -> Tensor:
        canvas = _canvas(x, blank, hw_shape, selection)
        return take_tokens(_depthwise(canvas, weight, bias, hw_shape), selection)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, blank, weight, bias, ctx.hw_shape, selection = inputs
        ctx.save_for_backward(x, blank, weight, selection.token_ids)
        ctx.selection = selection._replace(token_ids=None)
        ctx.has_bias = bias is not None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, blank, weight, token_ids = ctx.saved_tensors
        selection = ctx.selection._replace(token_ids=token_ids)
        canvas = _canvas(x, blank, ctx.hw_shape, selection)
        grad_map = _canvas(grad, torch.zeros_like(blank), ctx.hw_shape, selection)
        channels, padding = len(weight), weight.shape[-1] // 2
        grad_canvas, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            to_map(grad_map, ctx.hw_shape),
            to_map(canvas, ctx.hw_shape),
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
        grad_x = take_tokens(grad_canvas, selection)
        grad_blank = None
        if ctx.needs_input_grad[1]:
            grad_blank = (grad_canvas.sum(1) - grad_x.sum(1))[:, None]
        return grad_x, grad_blank, grad_weight, grad_bias, None, None


def _canvas(x: Tensor, blank: Tensor, hw_shape: tuple[int, int], selection: Selection) -> Tensor:
    """Active tokens in their places, blank (B, 1, C) in the others: (B, N, C)."""
    return fill_map(blank, hw_shape[0] * hw_shape[1], selection, x)


def _depthwise(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, hw_shape: tuple[int, int]
) -> Tensor:
    """Convolve all tokens (B, N, C) of a map by weight (C, 1, side, side)."""
    padding = weight.shape[-1] // 2
    out = F.conv2d(to_map(tokens, hw_shape), weight, bias, padding=padding, groups=len(weight))
    return to_tokens(out)


def _of(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]
