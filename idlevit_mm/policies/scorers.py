"""Scorers rank the tokens of a map: the higher the score, the sooner a token is active.

Shape letters: B images, N tokens of the map (H * W), P tokens before the map (class token), C
channels, A heads.

A scorer is a module, so that one with weights fits the same place, and is built for each block.
Scores must not be negative where a policy makes summaries of idle tokens (EViT, Evo-ViT).
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..ops import Selection, UnitLayout, in_chunks
from ..registry import SCORERS


class ScorableBlock(Protocol):
    """What a scorer or a policy may ask of the block whose tokens are ranked."""

    # Whether a summary of idle tokens changes what active ones become.
    uses_summaries: bool

    def unit_layout(self, hw_shape: tuple[int, int], device: torch.device) -> UnitLayout:
        """Units among which the best are chosen."""
        ...

    def map_tokens(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The tokens of the map (B, N, C) among all tokens x (B, P + N, C)."""
        ...

    def with_prefix(self, selection: Selection) -> Selection:
        """A selection among the map's tokens as one among all tokens, class token included."""
        ...

    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean token's query to every token: (B, A, N), rows sum to 1."""
        ...

    def class_query(self, x: Tensor, with_keys: bool) -> tuple[Tensor, Tensor | None]:
        """Mean over heads of the class token's query times every key (B, P + N); the keys."""
        ...


class Scorer(nn.Module, ABC):
    """Base of all scorers.

    Args:
        embed_dims: Channels of the tokens it will rank.
    """

    # Whether it computes with weights, of its own or of the block, whose precision binds it.
    uses_weights: ClassVar[bool] = False
    # Whether it has weights that are to be trained.
    learns: ClassVar[bool] = False
    # Whether it sees the class token, too, before the tokens of the map.
    needs_class_token: ClassVar[bool] = False
    # Whether the ranks are the attention that the block itself computes.
    ranks_after_attention: ClassVar[bool] = False

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.embed_dims = embed_dims

    @abstractmethod
    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        """Rank tokens.

        Args:
            x: (B, N, C), the map as it enters the block; float32 or float64, or the precision of
                the whole model where the scorer uses weights.
            hw_shape: Height and width of the map in tokens.
            block: The block that asks.

        Returns:
            (B, N), higher is kept first.
        """

    def score(
        self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock, with_keys: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rank tokens.

        Args:
            x: As for ``forward``.
            hw_shape: Height and width of the map in tokens.
            block: The block that asks.
            with_keys: Whether the attention can use keys that are computed here.

        Returns:
            The scores, with gradient only if the scorer learns, and the keys of all tokens (B, P +
            N, C) if they were computed on the way, with gradient.
        """
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return self(x, hw_shape, block), None


@SCORERS.register_module('mean_distance')
class MeanDistance(Scorer):
    """Euclidean distance of a token from the mean token of its map: what stands out is kept."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        means = x.mean(dim=1, keepdim=True)
        distances = [
            in_chunks(partial(_distance, other=mean), image, x.shape[-1])
            for image, mean in zip(x.split(1), means.split(1), strict=True)
        ]
        return torch.cat(distances).squeeze(-1)


@SCORERS.register_module('activation_norm')
class ActivationNorm(Scorer):
    """Mean absolute activation of a token over its channels.

    The policy SparseViT (arXiv 2303.17605) ranks windows by the L2 norm of this over their tokens;
    in the other policies a window has the mean, as with every scorer.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        return torch.linalg.vector_norm(x, ord=1, dim=-1) / x.shape[-1]


@SCORERS.register_module('mean_query')
class MeanQuery(Scorer):
    """Attention that the mean token pays to a token, averaged over heads.

    Takes the part of IdleViT's class token (arXiv 2310.05654), which pyramids lack.
    """

    uses_weights = True

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


@SCORERS.register_module('learned')
class Learned(Scorer):
    """A prediction head: LayerNorm, a small MLP, and a sigmoid.

    The head has its gradient from a straight-through gate at the active tokens: the product of what
    the block adds to a token with the gradient there. Its input is detached, so that the gate does
    not train the features.

    Args:
        embed_dims: Channels of the tokens it will rank.
        hidden_dims: Channels of the hidden layer; None for a quarter of ``embed_dims``.
    """

    uses_weights = True
    learns = True

    def __init__(self, embed_dims: int, hidden_dims: int | None = None) -> None:
        super().__init__(embed_dims)
        if hidden_dims is not None and hidden_dims < 1:
            raise ValueError(f'policy.scorer.hidden_dims={hidden_dims} must be at least 1')
        hidden = hidden_dims or max(embed_dims // 4, 1)
        self.norm = nn.LayerNorm(embed_dims)
        self.hidden = nn.Linear(embed_dims, hidden)
        self.act = nn.GELU()
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        hidden = self.act(self.hidden(self.norm(x.detach())))
        return self.out(hidden).squeeze(-1).sigmoid()


@SCORERS.register_module('class_query')
class ClassQuery(Scorer):
    """Mean over heads of the class token's query times the token's key (IdleViT, arXiv 2310.05654).

    The keys of all tokens are computed, as published, and those of the active ones used by the
    attention. Under autocast, where scores are computed in float32 and keys are not, the query is
    folded with the key projection instead, which gives the same scores.
    """

    uses_weights = True
    needs_class_token = True

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        return self.score(x, hw_shape, block, with_keys=False)[0]

    def score(
        self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock, with_keys: bool
    ) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(with_keys and torch.is_grad_enabled()):
            scores, keys = block.class_query(x, with_keys)
        return scores.detach()[:, -(hw_shape[0] * hw_shape[1]) :], keys


@SCORERS.register_module('class_attention')
class ClassAttention(Scorer):
    """Attention of the class token, mean over heads, as the block computes it (EViT, Evo-ViT)."""

    needs_class_token = True
    ranks_after_attention = True

    def forward(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        raise NotImplementedError('class_attention is read from the attention of the block')


def _distance(x: Tensor, other: Tensor) -> Tensor:
    """Euclidean distance of tokens (B, N, C) from (B, 1, C): (B, N, 1)."""
    return torch.linalg.vector_norm(x - other, dim=-1, keepdim=True)
