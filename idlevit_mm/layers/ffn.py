"""Feed-forward networks on packed tokens: Swin's and ViT's, and those of PVT, PVTv2 and MiT.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels.
"""

import torch
from mmcv.cnn import build_activation_layer
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.transformer import FFN
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from ..kernels import all_plain, backend_at, is_plain, known_plain
from ..ops import Rows, to_map, to_tokens

# Side of the kernels of the depth-wise convolution.
_SIDE = 3


@known_plain
class FeedForward(FFN):
    """mmcv's two-layer feed-forward network, its products by the backend's way."""

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """Compute the branch, with identity where the module adds it."""
        if not all_plain(self.layers):
            return super().forward(x, identity)
        (first, act, drop), second, last_drop = self.layers
        backend = backend_at(x)
        hidden = drop(act(backend.linear(x, first)))
        out = last_drop(backend.linear(hidden, second))
        out = self.dropout_layer(self.gamma2(out))
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out


@known_plain
class MixLayers(Sequential):
    """Layers of PVT's feed-forward network: point-wise, depth-wise or not, activation, point-wise.

    Point-wise layers are convolutions of 1 x 1 in their names and shapes.
    """

    def forward(
        self, x: Tensor, hw_shape: tuple[int, int], rows: Rows | None, cells: Tensor | None
    ) -> Tensor:
        """Compute packed tokens; see ``MixFFN.forward``."""
        first, *depthwise, act, drop, second, last_drop = self
        parts = [slice(None)]
        if depthwise and all_plain(self):
            # Channels of the convolution are independent: a large map is never there as a whole.
            rows_of_all = x.shape[0] * x.shape[1]
            parts = backend_at(x).channel_parts(first.out_channels, rows_of_all, self.training)
        out = None
        for part in parts:
            inner = _pointwise(x, first, part, slice(None))
            for conv in depthwise:
                inner = _convolve(inner, conv, part, hw_shape, rows, cells)
            added = _pointwise(drop(act(inner)), second, slice(None), part, bias=out is None)
            out = added if out is None else out.add_(added)
        return last_drop(out)


@known_plain
class MixFFN(BaseModule):
    """PVT's feed-forward network, with a 3x3 depth-wise convolution in PVTv2 (2106.13797) and MiT.

    Hidden features of idle tokens are not computed: the convolution sees zeros in their places, or
    those of their summary where there is one. A summary itself has no place in the map; it is
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
            layers.insert(1, nn.Conv2d(hidden, hidden, _SIDE, padding=1, groups=hidden))
        self.feedforward_channels = hidden
        self.use_conv = use_conv
        self.layers = MixLayers(*layers)
        self.dropout_layer = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        rows: Rows | None,
        cells: Tensor | None = None,
    ) -> Tensor:
        """The branch of active tokens (B, T, C), all N where ``rows`` is None, without identity.

        Behind them may be summaries of the idle ones: (B, T + R, C). ``cells`` (N,) says whose each
        token is; None if there is one.
        """
        return self.dropout_layer(self.layers(x, hw_shape, rows, cells))


def _pointwise(
    x: Tensor, layer: nn.Module, outputs: slice, inputs: slice, bias: bool = True
) -> Tensor:
    """Some channels of a convolution of 1 x 1 on tokens (B, T, C)."""
    if not is_plain(layer, nn.Conv2d):
        return to_tokens(layer(x.transpose(1, 2)[..., None]))
    weight = layer.weight.flatten(1)[outputs, inputs]
    own = layer.bias[outputs] if bias and layer.bias is not None else None
    return backend_at(x).product(x, weight, own)


def _convolve(
    x: Tensor,
    conv: nn.Module,
    part: slice,
    hw_shape: tuple[int, int],
    rows: Rows | None,
    cells: Tensor | None,
) -> Tensor:
    """Depth-wise convolution of the active tokens among the map, and of summaries behind them."""
    count = x.shape[1] if rows is None else rows.ids.shape[1]
    x, summaries = x[:, :count], x[:, count:]
    # Idle tokens are like their summary, where there is one.
    blank = summaries if summaries.shape[1] else None
    if not is_plain(conv, nn.Conv2d):
        return _convolve_by_module(x, summaries, conv, hw_shape, rows, cells)
    weight, bias = conv.weight[part], None if conv.bias is None else conv.bias[part]
    out = backend_at(x).convolve(x, blank, weight, bias, hw_shape, rows, cells)
    if blank is None:
        return out
    weight, bias = weight.to(x.dtype), 0.0 if bias is None else bias.to(x.dtype)
    return torch.cat([out, summaries * weight.sum(dim=(1, 2, 3)) + bias], dim=1)


def _convolve_by_module(
    x: Tensor,
    summaries: Tensor,
    conv: nn.Module,
    hw_shape: tuple[int, int],
    rows: Rows | None,
    cells: Tensor | None,
) -> Tensor:
    backend = backend_at(x)
    if rows is None:
        return to_tokens(conv(to_map(x, hw_shape)))
    blank = summaries if summaries.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])
    blank = blank.expand(-1, hw_shape[0] * hw_shape[1], -1) if cells is None else blank[:, cells]
    canvas = backend.put(blank, rows, x)
    out = backend.take(to_tokens(conv(to_map(canvas, hw_shape))), rows)
    if not summaries.shape[1]:
        return out
    alike = conv(summaries.flatten(0, 1)[..., None, None].expand(-1, -1, _SIDE, _SIDE))
    middle = alike[..., _SIDE // 2, _SIDE // 2]
    return torch.cat([out, middle.view(summaries.shape)], dim=1)
