"""Scorers rank the tokens of a map: the higher the score, the sooner a token is active.

Shape letters: B images, N tokens of the map (H * W), C channels, A heads.

A scorer is a module, so that one with weights fits the same place, and is built for each block.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from ..registry import SCORERS


class ScorableBlock(Protocol):
    """What a scorer may ask of the block whose tokens it ranks."""

    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean token's query to every token: (B, A, N), rows sum to 1."""
        ...


class Scorer(nn.Module, ABC):
    """Base of all scorers.

    Args:
        embed_dims: Channels of the tokens it will rank.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.embed_dims = embed_dims

    @abstractmethod
    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        """Rank tokens.

        Args:
            x: (B, N, C), the map as it enters the block; float32 or float64.
            hw_shape: Height and width of the map in tokens.
            block: The block that asks.

        Returns:
            (B, N), higher is kept first.
        """


@SCORERS.register_module('mean_distance')
class MeanDistance(Scorer):
    """Euclidean distance of a token from the mean token of its map: what stands out is kept."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        return torch.linalg.vector_norm(x - x.mean(dim=1, keepdim=True), dim=-1)


@SCORERS.register_module('activation_norm')
class ActivationNorm(Scorer):
    """Mean absolute activation of a token over its channels.

    SparseViT (arXiv 2303.17605) ranks windows by the L2 norm of this over their tokens; here, as
    for every scorer, a window has the mean.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        return torch.linalg.vector_norm(x, ord=1, dim=-1) / x.shape[-1]


@SCORERS.register_module('mean_query')
class MeanQuery(Scorer):
    """Attention that the mean token pays to a token, averaged over heads.

    Takes the part of IdleViT's class token (arXiv 2310.05654), which pyramids lack.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        return block.mean_query_attention(x).mean(dim=1)


@SCORERS.register_module('random')
class Random(Scorer):
    """A new random order for every image and block, from torch's global generator: a control."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        return torch.rand(x.shape[:2], device=x.device)


@SCORERS.register_module('uniform_grid')
class UniformGrid(Scorer):
    """A fixed order whose first K tokens are spread evenly over the map for every K: a control.

    The order is a two-dimensional Kronecker sequence, whose steps are the powers of the inverse
    plastic number (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
    """

    STEPS = (0.7548776662466927, 0.5698402909980532)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        height, width = hw_shape
        rows = torch.arange(height, device=x.device, dtype=torch.float64) * self.STEPS[0]
        cols = torch.arange(width, device=x.device, dtype=torch.float64) * self.STEPS[1]
        order = (rows[:, None] + cols[None, :]).frac().flatten().to(torch.float32)
        return order.expand(x.shape[0], -1)
