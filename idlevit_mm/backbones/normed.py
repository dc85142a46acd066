"""What blocks of all families are made of.

Shape letters: B images, C channels.
"""

from typing import Any, ClassVar

from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..blocks import IdleBlock
from ..layers import FeedForward
from ..policies import Plan


class NormedBlock(IdleBlock):
    """A block of a norm, an attention, a norm and a feed-forward network.

    Args:
        embed_dims: Channels of the tokens.
        norm_cfg: Both norms.
        drop_path_rate: Stochastic depth of both branches; ``attention`` may have one of its own.
        attention: Further arguments of ``ATTENTION``.
        feedforward: Further arguments of the feed-forward network.
        **kwargs: Further arguments of ``IdleBlock``.
    """

    ATTENTION: ClassVar[type[nn.Module]]

    def __init__(
        self,
        embed_dims: int,
        norm_cfg: dict,
        drop_path_rate: float,
        attention: dict[str, Any],
        feedforward: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dims, **kwargs)
        first, second = self.NORMS
        attention = dict(drop_path_rate=drop_path_rate) | attention
        self.add_module(first, build_norm_layer(norm_cfg, embed_dims)[1])
        self.attn = self.ATTENTION(embed_dims, **attention)
        self.add_module(second, build_norm_layer(norm_cfg, embed_dims)[1])
        self.ffn = self.feed_forward(drop_path_rate, feedforward)

    def feed_forward(self, drop_path_rate: float, feedforward: dict[str, Any]) -> nn.Module:
        """The layer of the second half."""
        drop_path = dict(type='DropPath', drop_prob=drop_path_rate)
        return FeedForward(self.embed_dims, dropout_layer=drop_path, **feedforward)

    def transform(self, now: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        return self.by_tokens(lambda x: self.ffn(self.norm2(x), x), now, self.norm2, self.ffn)
