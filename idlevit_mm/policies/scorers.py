"""Scorers rank the tokens of a map: the higher the score, the sooner a token is active.

Shape letters: B images, N tokens of the map (H * W), C channels, A heads.

A scorer is a module, so that one with weights fits the same place, and is built for each block. It
names what it needs to see, and the block computes that and nothing else.
Scores must not be negative where a policy makes summaries of idle tokens (EViT, Evo-ViT).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import backend_at
from ..ops import Extent, mean_inside
from ..registry import SCORERS


class Seen(NamedTuple):
    """What a scorer sees of the tokens as they enter a block.

    Attributes:
        tokens: (B, N, C), the map; float32 or float64, or the precision of the whole model where
            the scorer uses weights.
        hw_shape: Height and width of the map in tokens.
        mean_query: (B, A, N), attention of the mean token's query to every token, rows sum to 1.
        class_query: (B, N), mean over heads of the class token's query times the token's key.
        extent: Which tokens belong to their images, and are to enter means; None where all do.
    """

    tokens: Tensor
    hw_shape: tuple[int, int]
    mean_query: Tensor | None = None
    class_query: Tensor | None = None
    extent: Extent | None = None


class Scorer(nn.Module, ABC):
    """Base of all scorers.

    Args:
        embed_dims: Channels of the tokens it will rank.
    """

    # What it sees besides the tokens; ``class_attention`` is known only after the attention of the
    # block, which the policy then ranks by itself.
    NEEDS: ClassVar[Literal['tokens', 'mean_query', 'class_query', 'class_attention']] = 'tokens'
    # Whether it has weights that are to be trained.
    learns: ClassVar[bool] = False

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.embed_dims = embed_dims

    @property
    def needs_class_token(self) -> bool:
        """Whether it ranks by a class token."""
        return self.NEEDS.startswith('class_')

    @property
    def uses_weights(self) -> bool:
        """Whether it computes with weights, its own or the block's, whose precision binds it."""
        return self.learns or self.NEEDS != 'tokens'

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Rank tokens: (B, N), higher is kept first."""


@SCORERS.register_module('mean_distance')
class MeanDistance(Scorer):
    """Euclidean distance of a token from the mean token of its map: what stands out is kept."""

    def forward(self, seen: Seen) -> Tensor:
        means = mean_inside(seen.tokens, seen.hw_shape, seen.extent)
        return backend_at(seen.tokens).distance(seen.tokens, means)


@SCORERS.register_module('activation_norm')
class ActivationNorm(Scorer):
    """Mean absolute activation of a token over its channels.

    The policy SparseViT (arXiv 2303.17605) ranks windows by the L2 norm of this over their tokens;
    in the other policies a window has the mean, as with every scorer.
    """

    def forward(self, seen: Seen) -> Tensor:
        return torch.linalg.vector_norm(seen.tokens, ord=1, dim=-1) / seen.tokens.shape[-1]


@SCORERS.register_module('local_contrast')
class LocalContrast(Scorer):
    """Euclidean distance of a token from the mean of the tokens around it: edges are kept.

    Unlike the distance from the mean of the map it does not favour large areas that stand out as a
    whole, and prefers the rims of things, where boxes end.

    Args:
        embed_dims: Channels of the tokens it will rank.
        window: Side of the square around a token in tokens, odd and at least 3; what lies outside
            the map does not count.
    """

    def __init__(self, embed_dims: int, window: int = 5) -> None:
        super().__init__(embed_dims)
        if not isinstance(window, int) or window < 3 or window % 2 == 0:
            raise ValueError(f'policy.scorer.window={window!r} must be odd and at least 3')
        self.window = window

    def forward(self, seen: Seen) -> Tensor:
        grid = seen.tokens.unflatten(1, seen.hw_shape).permute(0, 3, 1, 2)
        pad = self.window // 2
        if seen.extent is None:
            around = F.avg_pool2d(grid, self.window, 1, pad, count_include_pad=False)
        else:
            inside = seen.extent.inside.unflatten(1, seen.hw_shape)[:, None].to(grid.dtype)
            total, share = (F.avg_pool2d(x, self.window, 1, pad) for x in (grid * inside, inside))
            around = total / share.clamp(min=torch.finfo(share.dtype).tiny)
        return torch.linalg.vector_norm(grid - around, dim=1).flatten(1)


@SCORERS.register_module('mean_query')
class MeanQuery(Scorer):
    """Attention that the mean token pays to a token, averaged over heads.

    Takes the part of IdleViT's class token (arXiv 2310.05654), which pyramids lack.
    """

    NEEDS = 'mean_query'

    def forward(self, seen: Seen) -> Tensor:
        assert seen.mean_query is not None
        return seen.mean_query.mean(dim=1)


@SCORERS.register_module('random')
class Random(Scorer):
    """A new random order for every image and block, from torch's global generator: a control."""

    def forward(self, seen: Seen) -> Tensor:
        return torch.rand(seen.tokens.shape[:2], device=seen.tokens.device)


@SCORERS.register_module('uniform_grid')
class UniformGrid(Scorer):
    """A fixed order whose first K tokens are spread evenly over the map for every K: a control.

    The order is a two-dimensional Kronecker sequence, whose steps are the powers of the inverse
    plastic number (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
    """

    STEPS = (0.7548776662466927, 0.5698402909980532)

    def forward(self, seen: Seen) -> Tensor:
        (height, width), x = seen.hw_shape, seen.tokens
        rows = torch.arange(height, device=x.device, dtype=torch.float64) * self.STEPS[0]
        cols = torch.arange(width, device=x.device, dtype=torch.float64) * self.STEPS[1]
        order = (rows[:, None] + cols[None, :]).frac().flatten().to(torch.float32)
        return order.expand(x.shape[0], -1)


_LESSONS = ('gain', 'importance')
_FIRST = (None, 'mean_distance', 'activation_norm', 'local_contrast')


class _ByImportance(torch.autograd.Function):
    """Scores (B, N) whose gradient becomes the mean size of their gradients less its own size.

    Of tokens that get none it stays 0. It scales with the loss, as loss scaling wants it.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        sizes = grads[0].abs()
        means = sizes.sum(dim=1, keepdim=True) / (sizes > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(sizes > 0, means - sizes, 0.0)


@SCORERS.register_module('learned')
class Learned(Scorer):
    """A prediction head: LayerNorm, a small MLP, and a sigmoid.

    The head has its gradient from a straight-through gate at the active tokens: the product of what
    the block adds to a token with the gradient there. Its input is detached, so that the gate does
    not train the features.

    That gradient says whether more of what the block adds would be better, not what its loss would
    cost; its size says how much the task depends on it.

    Args:
        embed_dims: Channels of the tokens it will rank.
        hidden_dims: Channels of the hidden layer; None for a quarter of ``embed_dims``.
        learns_from: What raises a score: the ``gain``, that gradient with its sign; or the
            ``importance`` of a token, its size above the mean of the active tokens of the image.
        begins_as: A scorer of tokens alone whose order is the first one: the odds of a score are
            its scores, relative to their mean, times the exponential of what the head says, which
            is little at the start. None: the first order is that of random weights.

    Raises:
        ValueError: ``hidden_dims`` is not positive, or ``learns_from`` or ``begins_as`` unknown.
    """

    learns = True

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int | None = None,
        learns_from: str = 'gain',
        begins_as: str | None = None,
    ) -> None:
        super().__init__(embed_dims)
        known = ('learns_from', learns_from, _LESSONS), ('begins_as', begins_as, _FIRST)
        for name, value, allowed in known:
            if value not in allowed:
                listed = ', '.join(map(str, allowed))
                raise ValueError(f'policy.scorer.{name}={value!r} is unknown; allowed: {listed}')
        self.learns_from, self.first = learns_from, None
        if begins_as is not None:
            self.first = SCORERS.build(dict(type=begins_as, embed_dims=embed_dims))
        if hidden_dims is not None and hidden_dims < 1:
            raise ValueError(f'policy.scorer.hidden_dims={hidden_dims} must be at least 1')
        hidden = hidden_dims or max(embed_dims // 4, 1)
        self.norm = nn.LayerNorm(embed_dims)
        self.hidden = nn.Linear(embed_dims, hidden)
        self.act = nn.GELU()
        self.out = nn.Linear(hidden, 1)

    def forward(self, seen: Seen) -> Tensor:
        hidden = self.act(self.hidden(self.norm(seen.tokens.detach())))
        logits = self.out(hidden).squeeze(-1)
        if self.first is not None:
            with torch.no_grad():
                first = self.first(seen)
                first = first.clamp(min=torch.finfo(first.dtype).tiny)
            logits = logits + (first / first.mean(dim=1, keepdim=True)).log()
        scores = logits.sigmoid()
        # Without gradient autograd functions are only in the way of who records a graph.
        if self.learns_from == 'gain' or not scores.requires_grad:
            return scores
        return _ByImportance.apply(scores)


@SCORERS.register_module('class_query')
class ClassQuery(Scorer):
    """Mean over heads of the class token's query times the token's key (IdleViT, arXiv 2310.05654).

    The keys of all tokens are computed, as published, and those of the active ones used by the
    attention. Under autocast, where scores are computed in float32 and keys are not, the query is
    folded with the key projection instead, which gives the same scores.
    """

    NEEDS = 'class_query'

    def forward(self, seen: Seen) -> Tensor:
        assert seen.class_query is not None
        return seen.class_query


@SCORERS.register_module('class_attention')
class ClassAttention(Scorer):
    """Attention of the class token, mean over heads, as the block computes it (EViT, Evo-ViT)."""

    NEEDS = 'class_attention'

    def forward(self, seen: Seen) -> Tensor:
        raise NotImplementedError('class_attention is read from the attention of the block')
