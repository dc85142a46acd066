"""The sequence of an idle block: score, select, gather, compute, scatter.

Shape letters: B images, N tokens of the map (H * W), P tokens before the map (class token), T
active tokens, R summaries of idle tokens, C channels, A heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import Selection, UnitLayout, keep_mask, map_units, put_tokens, take_tokens
from ..policies import Plan, build_policy


class IdleBlock(BaseModule, ABC):
    """A transformer block that computes only the active tokens of a map.

    A family implements ``compute`` and ``mean_query_attention``, and extends ``SCOPES``,
    ``unit_layout``, ``summarize`` and ``spread`` where it knows more than the whole map.

    Args:
        embed_dims: Channels of the tokens.
        policy: Config of the idling policy; None for the default.
        with_cp: Whether to recompute the block in the backward pass instead of storing it.
        class_token: Whether the first token is a class token.
    """

    SCOPES: tuple[str, ...] = ('map',)
    # Whether a summary of idle tokens changes what active ones become.
    uses_summaries: bool = True

    def __init__(
        self,
        embed_dims: int,
        policy: dict[str, Any] | None = None,
        with_cp: bool = False,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.policy = build_policy(policy, embed_dims, self.SCOPES, class_token)

    def forward(
        self, x: Tensor, hw_shape: tuple[int, int], keep_ratio: float = 1.0, memory: Any = None
    ) -> tuple[Tensor, Selection | None, Any]:
        """Run the block.

        Args:
            x: (B, P + N, C), the tokens.
            hw_shape: Height and width of the map in tokens.
            keep_ratio: Share of the units that is active; 1.0 is the dense block, without scoring
                and gathering (unless the policy has taken tokens out of play before).
            memory: What the block before returned; None at the start of a stage.

        Returns:
            The tokens (B, P + N, C), idle rows bit-identical unless the policy says otherwise;
            which units were active, None where all of them were; and the policy's memory.
        """
        # torch.compile traces a second image size with symbolic sides; index tables need numbers.
        return self.run(x, (len(range(hw_shape[0])), len(range(hw_shape[1]))), keep_ratio, memory)

    def run(
        self, x: Tensor, hw_shape: tuple[int, int], keep_ratio: float, memory: Any
    ) -> tuple[Tensor, Selection | None, Any]:
        """Plan, gather, compute, scatter; arguments and results are those of ``forward``."""
        # Planned outside the checkpoint: a recomputation must not choose other tokens.
        plan, memory = self.policy.plan(x, hw_shape, keep_ratio, self, memory)
        x = self.checkpointed(self._run, x, hw_shape, plan)
        return x, plan.selection, memory

    def checkpointed(
        self, function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a function of x, to be recomputed in the backward pass if the block is set so."""
        if self.with_cp and x.requires_grad:
            return checkpoint(function, x, *args, use_reentrant=False, **kwargs)
        return function(x, *args, **kwargs)

    def unit_layout(self, hw_shape: tuple[int, int], device: torch.device) -> UnitLayout:
        """Units among which the policy chooses."""
        return map_units(*hw_shape, device)

    def map_tokens(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The tokens of the map: (B, N, C) of x (B, P + N, C)."""
        return x

    def with_prefix(self, selection: Selection) -> Selection:
        """A selection among the map's tokens as one among all tokens, class token included."""
        return selection

    @abstractmethod
    def compute(self, active: Tensor, x: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        """Dense maths of the block on packed tokens.

        Args:
            active: (B, T + R, C), the active tokens, then the summaries; x itself where all tokens
                are active.
            x: (B, P + N, C), all tokens, for blocks whose idle tokens serve as context.
            hw_shape: Height and width of the map in tokens.
            plan: What to do.

        Returns:
            (B, T + R, C), the new active tokens and summaries.
        """

    @abstractmethod
    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean token's query to every token of the map x (B, N, C): (B, A, N)."""

    def class_query(self, x: Tensor, with_keys: bool) -> tuple[Tensor, Tensor | None]:
        """Rank all tokens by the class token's query, in blocks that have one.

        Args:
            x: (B, P + N, C), all tokens.
            with_keys: Whether to compute the keys of all tokens on the way.

        Returns:
            Mean over heads of the query times every key: (B, P + N), and the keys (B, P + N, C) or
            None.
        """
        raise NotImplementedError(f'{type(self).__name__} has no class token')

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """Share of each token's attention that would go to active tokens, were none idle.

        Args:
            x: (B, P + N, C), all tokens as they enter the block.
            hw_shape: Height and width of the map in tokens.
            mask: (B, P + N), or (B, P + N, V) for V masks at once; 1 for active tokens.

        Returns:
            Of the shape of ``mask``: sum over keys j of W_ij * mask_j, with W the softmax over j of
            the head mean of the scaled logits.
        """
        raise NotImplementedError(f'{type(self).__name__} does not implement kept_share')

    def summarize(self, x: Tensor, weights: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Weighted mean of the idle tokens of each group: (B, R, C); here of the whole map.

        Args:
            x: (B, P + N, C), all tokens.
            weights: (B, N), 0 for active tokens.
            hw_shape: Height and width of the map in tokens.
        """
        return weighted_mean(self.map_tokens(x, hw_shape)[:, None], weights[:, None])

    def spread(self, summaries: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Give the summary of a group to all its tokens: (B, R, C) to (B, P + N, C) or alike."""
        return summaries

    def gather(self, x: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        """The active tokens of x (B, P + N, C), then the summaries: (B, T + R, C)."""
        if plan.selection is None:
            return x
        active = take_tokens(x, plan.selection)
        if plan.idle_weights is None:
            return active
        return torch.cat([active, self.summarize(x, plan.idle_weights, hw_shape)], dim=1)

    def scatter(
        self, x: Tensor, before: Tensor, after: Tensor, hw_shape: tuple[int, int], plan: Plan
    ) -> Tensor:
        """All tokens after the block.

        Args:
            x: (B, P + N, C), all tokens before the block.
            before: (B, T + R, C), the active tokens and summaries as they were gathered.
            after: (B, T + R, C), the same after the block.
            hw_shape: Height and width of the map in tokens.
            plan: What was done.
        """
        if plan.selection is None:
            return after if plan.gate is None else gated(before, after, plan.gate)
        count = plan.selection.token_ids.shape[1]
        active = after[:, :count]
        if plan.gate is not None:
            active = gated(before[:, :count], active, plan.gate)
        out = put_tokens(x, plan.selection, active)
        if plan.spreads:
            added = self.spread(after[:, count:] - before[:, count:], hw_shape)
            idle = ~keep_mask(plan.selection, x.shape[1])[..., None]
            out = out + torch.where(idle, added, 0.0).to(out.dtype)
        return out

    def _run(self, x: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        before = self.gather(x, hw_shape, plan)
        after = self.compute(before, x, hw_shape, plan)
        return self.scatter(x, before, after, hw_shape, plan)


def weighted_mean(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens of (B, R, S, C) by weights (B, R, S): (B, R, C); zero without weight."""
    total = weights.sum(dim=-1, keepdim=True)
    share = torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return (share.to(tokens.dtype)[..., None, :] @ tokens).squeeze(-2)


def gated(before: Tensor, after: Tensor, gate: Tensor) -> Tensor:
    """Give the gate (B, K), whose value is 0, the gradient of scaling what the block has added.

    Args:
        before: (B, T, C), tokens before the block; K <= T, the gate is for the last ones.
        after: (B, T, C), tokens after the block, whose values are returned.
        gate: (B, K).
    """
    first = after.shape[1] - gate.shape[1]
    added = (after - before).detach()[:, first:]
    scaled = after[:, first:] + gate.to(after.dtype)[..., None] * added
    return scaled if first == 0 else torch.cat([after[:, :first], scaled], dim=1)
