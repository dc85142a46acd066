"""The sequence of an idle block: look, plan, attention half, MLP half.

Shape letters: B images, S rows of x (the map, then P class tokens, then what a policy has
appended), N tokens of the map (hw_shape: H * W), T computed rows, R summaries of idle tokens, C
channels, A heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import all_plain, backend_at, full_precision, ranking_precision, site_of
from ..ops import Extent, Rows, Units, WindowLayout, map_units, units_inside, window_layout
from ..policies import Plan, Regroup, Seen, build_policy
from .cost import Payer, Work
from .functions import (
    attended_by_few,
    counted,
    fitted,
    gated,
    group_means,
    is_alone,
    numbers,
    to_groups,
    with_rows,
)
from .tokens import Carried, Pack, Tokens

START = Carried()


class IdleBlock(BaseModule, ABC):
    """A transformer block that computes only the active tokens of a map.

    A family names its attention ``attn``, implements ``attend`` and ``transform``, and extends
    ``SCOPES``, ``units``, ``summarize`` and ``spread`` where it knows more than the whole map.

    Args:
        embed_dims: Channels of the tokens.
        policy: Config of the idling policy; None for the default.
        with_cp: Whether to recompute the block in the backward pass instead of storing it.
        num_class: P, class tokens behind the map, the first of which policies look at.

    In families ``attention`` and ``feedforward`` hold further arguments of the block's two layers.
    """

    SCOPES: tuple[str, ...] = ('map',)
    NORMS: tuple[str, str] = ('norm1', 'norm2')  # names of those before attention and network
    # Whether summaries of idle tokens change active ones, and mean the same in the next block.
    uses_summaries: bool = True
    holds_summaries: bool = True
    reads_map: bool = False  # whether the attention looks at the whole map, whatever is computed
    has_cells: bool = False  # whether each cell of the map may have a summary, which is no key
    payer: Payer | None = None  # says where idling pays; None where it always idles

    def __init__(
        self,
        embed_dims: int,
        policy: dict[str, Any] | None = None,
        with_cp: bool = False,
        num_class: int = 0,
    ) -> None:
        super().__init__()
        self.embed_dims, self.with_cp, self.num_class = embed_dims, with_cp, num_class
        self.policy = build_policy(policy, embed_dims, self.SCOPES, num_class > 0, self.has_cells)
        self.summary_size = self.policy.summary_size

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        keep_ratio: float = 1.0,
        carried: Carried = START,
    ) -> tuple[Tensor, Carried]:
        """Run the block.

        Args:
            x: (B, S, C), the tokens.
            hw_shape: (H, W).
            keep_ratio: Share of the units that is active; 1.0 is the dense block, without scoring
                and gathering (unless the policy has taken tokens out of play before).
            carried: What the block before returned; ``START`` at the start of a stage.

        Returns:
            The tokens (B, S, C), idle rows bit-identical unless the policy says otherwise, and what
            the next block is to be given; while that holds a pack, ``settled`` has the tokens.
        """
        alone = not torch.is_grad_enabled() and is_alone(self, self.policy.scorer)
        owned, centre = (carried.owned, carried.centre) if alone else (False, None)
        tokens = Tokens(x, numbers(hw_shape), carried.pack, owned=owned, centre=centre)
        tokens, plan, state, keys = self.chosen(tokens, keep_ratio, carried)
        if not plan.ask:
            tokens = self.recomputed(self.both_halves, tokens, plan, keys)
            left = Carried(tokens.pack, plan, state, tokens.owned, carried.extent, tokens.centre)
            return tokens.x, left if alone else left._replace(owned=False, centre=None)
        tokens, attention = self.recomputed(self.attention_half, tokens, plan, keys)
        attention = counted(attention, plan.rows, carried.extent)
        regroup, state = self.policy.between(attention, plan, keep_ratio, state)
        tokens, plan = self.regrouped(tokens, plan, regroup)
        tokens = self.recomputed(self.mlp_half, tokens, plan)
        return tokens.x, Carried(tokens.pack, plan, state, extent=carried.extent)

    # What a family says

    @abstractmethod
    def attend(
        self, tokens: Tokens, plan: Plan, keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The attention branch (B, T + P + R, C), norm included and identity left out.

        And where the plan asks, the class token's attention to the computed rows, mean over heads:
        (B, T). ``tokens.now`` attends; ``tokens.x`` is up to date where ``reads_map``, or the keys
        of the plan are all. ``keys`` (B, S, C) are those of all rows, if scoring computed them.
        """

    @abstractmethod
    def transform(self, now: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        """Norm, MLP and identity of the computed rows (B, T + P + R, C)."""

    def entering(self, x: Tensor) -> Tensor:
        """What attention sees of tokens (..., C)."""
        return getattr(self, self.NORMS[0])(x)

    def mean_query(self, x: Tensor, hw_shape: tuple[int, int], extent: Extent | None) -> Tensor:
        """Attention of the mean token's query to every token of the map x (B, N, C): (B, A, N)."""
        return self.attn.mean_query_attention(self.entering(x), hw_shape, extent)

    def class_query(self, x: Tensor, hw_shape: tuple[int, int], with_keys: bool) -> Any:
        """Mean over heads of the class token's query times every key of x (B, S, C): (B, S).

        And the keys (B, S, C), or None without ``with_keys``.
        """
        raise NotImplementedError(f'{type(self).__name__} has no class token')

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """Share of each token's attention that would go to active tokens, were none idle.

        Of x (B, S, C), all tokens as they enter the block, and a mask (B, S), or (B, S, V) for V at
        once, 1 for active tokens. Of the shape of the mask: sum over keys j of W_ij * mask_j, with
        W the softmax over j of the head mean of the scaled logits.
        """
        return self.attn.kept_share(self.entering(x), hw_shape, mask)

    def units(self, hw_shape: tuple[int, int], scope: str, device: torch.device) -> Units:
        """Units among which the policy chooses."""
        return map_units(*hw_shape, device)

    def groups(self, hw_shape: tuple[int, int], device: torch.device) -> WindowLayout | None:
        """Windows or cells whose idle tokens have a summary each; None for one of the map."""
        side = self.summary_size
        return window_layout(*hw_shape, side, 0, device) if side else None

    def summarize(self, x: Tensor, weights: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Mean of the idle tokens of each group by weights (B, N): (B, R, C)."""
        return group_means(x, weights, self.groups(hw_shape, x.device))

    def spread(self, summaries: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Give the summary of a group to all its tokens: (B, R, C) to (B, S, C) or alike."""
        return to_groups(summaries, self.groups(hw_shape, summaries.device), self.num_class)

    def computing(
        self, batch: int, hw_shape: tuple[int, int], rows: float, attending: float
    ) -> Work:
        """What the two halves cost for a batch of maps of which so many rows are computed."""
        raise NotImplementedError(f'{type(self).__name__} does not say what it costs')

    # The walk

    def chosen(
        self, tokens: Tokens, keep_ratio: float, carried: Carried
    ) -> tuple[Tokens, Plan, Any, Tensor | None]:
        """``look``, then ``planned``: tokens, plan, state, and keys if they are known."""
        done = backend_at(tokens.x).choose(self, tokens, keep_ratio, carried.extent)
        if done is not None:
            return done[0], Plan(done[1]), None, None
        tokens, scores, keys = self.look(tokens, keep_ratio, carried)
        plan, state = self.planned(tokens, scores, keep_ratio, carried)
        return tokens, plan, state, keys

    def look(
        self, tokens: Tokens, keep_ratio: float, carried: Carried
    ) -> tuple[Tokens, Tensor | None, Tensor | None]:
        """Scores of the map (B, N), if the policy wants them or the scorer is to learn.

        They have a gradient only if the scorer learns. And the keys of all rows (B, S, C), with
        gradient, if they were computed on the way.
        """
        scorer = self.policy.scorer
        learns = scorer.learns and self.training
        if not learns and not self.policy.wants_scores(keep_ratio, carried.state):
            return tokens, None, None
        tokens = tokens.settled(self.settled(tokens))
        # Asked for before autocast is switched off, under which keys have another precision.
        x = ranking_precision(tokens.x, scorer.uses_weights)
        with_keys = not site_of(tokens.x).autocast
        with full_precision(tokens.x):
            seen, keys = self._seen(x, tokens.hw_shape, with_keys, carried.extent)
            with torch.set_grad_enabled(scorer.learns and torch.is_grad_enabled()):
                return tokens, scorer(seen), keys

    def planned(
        self, tokens: Tokens, scores: Tensor | None, keep_ratio: float, carried: Carried
    ) -> tuple[Plan, Any]:
        """Ask the policy for a plan, and fit it to this block.

        It happens outside of what is recomputed: a recomputation must not choose other tokens.
        """
        units = self.units(tokens.hw_shape, self.policy.scope, tokens.x.device)
        units = units_inside(units, tokens.hw_shape, carried.extent)
        wanted = self.policy.wants_scores(keep_ratio, carried.state)
        numbers = None if scores is None or not wanted else scores.detach()
        plan, state = self.policy.plan(numbers, units, keep_ratio, carried.plan, carried.state)
        plan, fewer = fitted(self, plan, scores), self.policy.attending(keep_ratio)
        if fewer == 0.0:
            plan = plan.but(attends='nothing')
        elif fewer < keep_ratio:
            best, _ = self.policy.plan(numbers, units, fewer, carried.plan, carried.state)
            plan = plan.but(attends=fitted(self, best, scores))
        return plan, state

    def recomputed(self, function: Callable[..., Any], x: Tokens | Tensor, *args: Any) -> Any:
        """Call a function of tokens, to be recomputed in the backward pass if the block is so."""
        if self.with_cp and (x.now if isinstance(x, Tokens) else x).requires_grad:
            return checkpoint(function, x, *args, use_reentrant=False)
        return function(x, *args)

    def both_halves(self, tokens: Tokens, plan: Plan, keys: Tensor | None) -> Tokens:
        """``attention_half``, then ``mlp_half``."""
        if plan.attends is None:
            tokens, _ = self.attention_half(tokens, plan, keys)
        else:
            tokens = attended_by_few(self, tokens, plan, keys)
        return self.mlp_half(tokens, plan)

    def attention_half(
        self, tokens: Tokens, plan: Plan, keys: Tensor | None
    ) -> tuple[Tokens, Tensor | None]:
        """Gather, attend, add; and the class token's attention (B, T) where the plan asks."""
        done = backend_at(tokens.x).attention_half(self, tokens, plan, keys)
        if done is not None:
            return done
        tokens = self.opened(tokens, plan)
        branch, attention = self.attend(tokens, plan, keys)
        return tokens.become(tokens.now + branch), attention

    def mlp_half(self, tokens: Tokens, plan: Plan) -> Tokens:
        """Transform, and put the rows back unless they are held."""
        done = backend_at(tokens.x).mlp_half(self, tokens, plan)
        if done is not None:
            return done
        now = self.transform(tokens.now, tokens.hw_shape, plan)
        return self.closed(tokens.become(now), plan)

    def opened(self, tokens: Tokens, plan: Plan) -> Tokens:
        """Tokens with the rows of a plan packed, as they are already if the pack holds them."""
        pack = tokens.pack
        if pack is not None and pack.holds(plan):
            if not (self.reads_map or plan.keys == 'all'):
                return tokens
            return tokens._replace(x=self.settled(tokens), pack=pack._replace(before=pack.now))
        x = self.settled(tokens)
        if plan.rows is None:
            return Tokens(x, tokens.hw_shape, Pack(x, x, None, plan))
        rows = self.with_class(plan.rows, tokens.hw_shape)
        now = backend_at(x).take(x, rows)
        if plan.summary is not None:
            summaries = self.summarize(x, plan.summary, tokens.hw_shape)
            now = torch.cat([now, summaries], dim=1)
        return Tokens(x, tokens.hw_shape, Pack(now, now, rows, plan), owned=tokens.owned)

    def closed(self, tokens: Tokens, plan: Plan) -> Tokens:
        """Tokens with what was computed in its place, unless the plan holds it."""
        if plan.gate is not None and tokens.pack is not None:
            tokens = tokens.become(gated(tokens.pack.before, tokens.now, plan.gate))
        if plan.hold and plan.rows is not None:
            return tokens
        x = self.settled(tokens)
        # Rows that were put back lie in a copy; what layers have made, their hooks may hold.
        return Tokens(x, tokens.hw_shape) if plan.rows is None else tokens.made(x)

    def settled(self, tokens: Tokens) -> Tensor:
        """All tokens, up to date: (B, S, C); idle ones have what their plan gives them."""
        pack = tokens.pack
        if pack is None:
            return tokens.x
        if pack.rows is None:
            return pack.now
        x, count, backend = tokens.x, pack.rows.ids.shape[1], backend_at(tokens.x)
        if pack.plan.spread:
            # To all rows: what was computed is put over it.
            added = self.spread(pack.now[:, count:] - pack.before[:, count:], tokens.hw_shape)
            x = x + added.to(x.dtype)
        put = backend.overwrite if tokens.owned or pack.plan.spread else backend.put
        return put(x, pack.rows, pack.now[:, :count])

    def regrouped(self, tokens: Tokens, plan: Plan, regroup: Regroup | None) -> tuple[Tokens, Plan]:
        """Let some of the computed rows leave, and append one that stands for them."""
        if regroup is None:
            return tokens, plan
        # Who leaves keeps what attention has made of it.
        x, now, keep = self.settled(tokens), tokens.now, regroup.keep
        ids = keep if plan.rows is None else plan.rows.ids.gather(1, keep)
        count = now.shape[1] - self.num_class
        staying = backend_at(now).take(now, Rows(with_rows(keep, count, self.num_class)))
        if regroup.fuse is not None:
            fused = regroup.fuse.to(now.dtype)[:, None] @ now[:, :count]
            ids = torch.cat([ids, torch.full_like(ids[:, :1], x.shape[1])], dim=1)
            kept, classes = staying.split_with_sizes([keep.shape[1], self.num_class], dim=1)
            x, staying = torch.cat([x, fused], dim=1), torch.cat([kept, fused, classes], dim=1)
        plan = plan.but(rows=Rows(ids), hold=True)
        pack = Pack(staying, staying, self.with_class(Rows(ids), tokens.hw_shape), plan)
        return Tokens(x, tokens.hw_shape, pack), plan

    def with_class(self, rows: Rows, hw_shape: tuple[int, int]) -> Rows:
        """Rows and the class tokens, which are computed in every block."""
        if not self.num_class:
            return rows
        return Rows(with_rows(rows.ids, hw_shape[0] * hw_shape[1], self.num_class))

    def by_tokens(self, function: Callable[[Tensor], Tensor], x: Tensor, *of: nn.Module) -> Tensor:
        """Apply a function of single tokens that consists of some layers, in parts if it pays."""
        if not all_plain(*of):
            return function(x)
        return backend_at(x).by_tokens(function, x, self.ffn.feedforward_channels, self.training)

    def _seen(
        self, x: Tensor, hw_shape: tuple[int, int], with_keys: bool, extent: Extent | None
    ) -> tuple[Seen, Tensor | None]:
        """What the scorer needs, and the keys of all rows if they were computed on the way."""
        scorer, count = self.policy.scorer, hw_shape[0] * hw_shape[1]
        seen = x[:, :count] if self.num_class else x
        mean_query = class_query = keys = None
        if scorer.NEEDS == 'class_query':
            with torch.set_grad_enabled(with_keys and torch.is_grad_enabled()):
                query, keys = self.class_query(x, hw_shape, with_keys)
            class_query = query.detach()[:, :count]
        elif scorer.NEEDS == 'mean_query':
            with torch.set_grad_enabled(scorer.learns and torch.is_grad_enabled()):
                mean_query = self.mean_query(seen, hw_shape, extent)
        return Seen(seen, hw_shape, mean_query, class_query, extent), keys
