"""Rules that were tried and are in no release: policies and a scorer for studies alone.

Shape letters: B images, N tokens of the map, K active tokens, C channels (hidden ones where a
convolution is meant).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from idlevit_mm.blocks.idle_block import IdleBlock
from idlevit_mm.blocks.tokens import Pack, Tokens
from idlevit_mm.kernels import backend_at
from idlevit_mm.layers import ffn
from idlevit_mm.ops import Rows, Units
from idlevit_mm.policies import EvoViT, IdleViT, Plan, Policy
from idlevit_mm.policies.scorers import MeanQuery, Seen
from idlevit_mm.registry import POLICIES, SCORERS


@POLICIES.register_module()
class AgedIdleViT(IdleViT):
    """Scores grow by a half with each block that a token has been idle in a row."""

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Any]:
        if scores is None:
            return super().plan(scores, units, keep_ratio, last, state)[0], state
        ages = torch.zeros_like(scores) if state is None else state
        plan, _ = super().plan(scores * (1 + 0.5 * ages), units, keep_ratio, last, None)
        assert plan.rows is not None
        return plan, (ages + 1).scatter(1, plan.rows.ids, 0.0)


@POLICIES.register_module()
class BlendedIdleViT(IdleViT):
    """Scores are the mean of those of this block and of the idle block before, each of mean 1."""

    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Any]:
        if scores is None:
            return super().plan(scores, units, keep_ratio, last, state)[0], state
        own = scores / scores.mean(dim=1, keepdim=True)
        ranked = own if state is None else (own + state) / 2
        return super().plan(ranked, units, keep_ratio, last, None)[0], own


@SCORERS.register_module('query_logits')
class QueryLogits(MeanQuery):
    """As IdleViT ranks by its class token: heads are averaged before the softmax, not behind it."""

    def forward(self, seen: Seen) -> Tensor:
        # The logarithm is the logit but for a number of each head, which ranks nothing.
        assert seen.mean_query is not None
        return seen.mean_query.log().mean(dim=1)


_CONVOLVE = ffn._convolve


class _LastHidden:
    """What idle tokens were when they were last computed, in place of zeros in a convolution."""

    def __init__(self) -> None:
        self.known: dict[Any, Tensor] = {}
        self.seen: set[nn.Module] = set()

    def __call__(
        self,
        x: Tensor,
        conv: nn.Module,
        part: slice,
        hw_shape: tuple[int, int],
        rows: Rows | None,
        cells: Tensor | None,
    ) -> Tensor:
        """Hidden features (B, K, C) of active tokens, convolved among the last ones of all."""
        if rows is not None and rows.ids.shape[1] != x.shape[1]:  # of a policy with summaries
            return _CONVOLVE(x, conv, part, hw_shape, rows, cells)
        key, number = (hw_shape, part.start, x.shape[2]), hw_shape[0] * hw_shape[1]
        if key[1] in (None, 0):
            if conv in self.seen:  # another pass has begun
                self.known, self.seen = {}, set()
            self.seen.add(conv)
        last, backend = self.known.get(key), backend_at(x)
        if last is None or len(last) != len(x) or last.device != x.device:
            last = x.new_zeros(len(x), number, x.shape[2])
        self.known[key] = x if rows is None else backend.put(last, rows, x)
        own = torch.arange(number, device=x.device)
        bias = None if conv.bias is None else conv.bias[part]
        return backend.convolve(x, last, conv.weight[part], bias, hw_shape, rows, own)


@POLICIES.register_module()
class RememberingIdleViT(IdleViT):
    """In PVTv2's convolution idle tokens are what they were in the last block that computed them.

    From the moment that one is made, in all backbones of the process without summaries.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setattr(ffn, '_convolve', _LastHidden())  # noqa: B010


class _Giving(Policy):
    """A policy that says itself what idle tokens receive, once a block has run."""

    instead = False  # whether they receive nothing from their representatives then

    def added(self, x: Tensor, pack: Pack) -> Tensor:
        """What all tokens (B, N, C) receive; computed ones are put over it."""
        raise NotImplementedError


_SETTLED = IdleBlock.settled


def _settled(block: IdleBlock, tokens: Tokens) -> Tensor:
    pack, policy = tokens.pack, block.policy
    if isinstance(policy, _Giving) and pack is not None and pack.rows is not None:
        if policy.instead:
            pack = pack._replace(plan=pack.plan.but(spread=False))
        tokens = tokens._replace(x=tokens.x + policy.added(tokens.x, pack), pack=pack)
    return _SETTLED(block, tokens)


setattr(IdleBlock, 'settled', _settled)  # noqa: B010


@POLICIES.register_module()
class MixingEvoViT(_Giving, EvoViT):
    """Idle tokens receive what representatives received, mixed by likeness to them.

    The many-to-many mix of Token Transforming (arXiv 2506.05709) between idle tokens and the
    representatives of cells.
    """

    instead = True

    def added(self, x: Tensor, pack: Pack) -> Tensor:
        assert pack.rows is not None
        count = pack.rows.ids.shape[1]
        before, now = pack.before[:, count:], pack.now[:, count:]
        likeness = functional.normalize(x, dim=2) @ functional.normalize(before, dim=2).mT
        return (10 * likeness).softmax(dim=2) @ (now - before)


class _Fast(_Giving):
    """Idle tokens receive what two small layers make of their norm, which begins at nothing."""

    def __init__(self, embed_dims: int, **kwargs: Any) -> None:
        super().__init__(embed_dims, **kwargs)
        self.down = nn.Linear(embed_dims, embed_dims // 8)
        self.up = nn.Linear(embed_dims // 8, embed_dims)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def added(self, x: Tensor, pack: Pack) -> Tensor:
        x = functional.layer_norm(x, x.shape[2:])
        return self.up(functional.gelu(self.down(x)))


@POLICIES.register_module()
class FastIdleViT(_Fast, IdleViT):
    """IdleViT whose idle tokens receive a cheap update of their own."""


@POLICIES.register_module()
class FastEvoViT(_Fast, EvoViT):
    """Evo-ViT whose idle tokens receive a cheap update of their own besides."""
