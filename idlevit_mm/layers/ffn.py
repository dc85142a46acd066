"""The feed-forward network of PVT and PVTv2 on packed tokens."""

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from mmcv.cnn.bricks.drop import build_dropout
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from ..ops import Selection, put_tokens, take_tokens
from .shape import to_map, to_tokens


class MixFFN(BaseModule):
    """PVT's feed-forward network, with a 3x3 depth-wise convolution in PVTv2 (arXiv 2106.13797).

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
        first, *depthwise, act, drop, second, _ = self.layers
        x = pointwise(first, x)
        if self.use_conv:
            x = self._convolve(depthwise[0], x, hw_shape, selection)
        x = drop(pointwise(second, drop(act(x))))
        return self.dropout_layer(x)

    @staticmethod
    def _convolve(
        conv: nn.Conv2d, x: Tensor, hw_shape: tuple[int, int], selection: Selection | None
    ) -> Tensor:
        if selection is None:
            return to_tokens(conv(to_map(x, hw_shape)))
        num_active = selection.token_ids.shape[1]
        x, summaries = x[:, :num_active], x[:, num_active:]
        # Idle tokens are like their summary, where there is one.
        blank = summaries if summaries.shape[1] else x.new_zeros(())
        canvas = blank.expand(x.shape[0], hw_shape[0] * hw_shape[1], x.shape[2])
        canvas = put_tokens(canvas, selection, x)
        out = take_tokens(to_tokens(conv(to_map(canvas, hw_shape))), selection)
        if summaries.shape[1]:
            alike = summaries * conv.weight.sum(dim=(1, 2, 3)) + conv.bias
            out = torch.cat([out, alike.to(out.dtype)], dim=1)
        return out


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to tokens of shape (B, T, C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)
