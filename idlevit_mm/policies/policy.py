"""What all policies share: which tokens of a block are active, and what the idle ones receive.

Shape letters: B images, N tokens of the map (H * W), T active tokens, P tokens before the map
(class token), R summaries of idle tokens, C channels.

A policy keeps nothing between forward passes: what it must remember from block to block of a stage
is its *memory*, which the stage hands on.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import ROUNDINGS, Selection, autocasts, full_precision
from ..registry import POLICIES, SCORERS, build_from
from .scorers import ScorableBlock, Scorer

DEFAULT_POLICY = 'IdleViT'
DEFAULT_SCORER = 'mean_distance'


class Plan(NamedTuple):
    """What a block is to do.

    Attributes:
        selection: The active tokens, with the class token where there is one; None for all.
        gate: (B, K), zeros that carry the gradient of the scores of the last K tokens before the
            summaries; None if no score learns.
        idle_weights: (B, N), weight of each idle token in the summary of its group, 0 for active
            tokens; None for no summaries.
        spreads: Whether idle tokens receive what the block adds to their summary.
        keys: Keys where scoring has computed them already: (B, T, C), or (B, P + N, C) where idle
            tokens serve as context.
    """

    selection: Selection | None = None
    gate: Tensor | None = None
    idle_weights: Tensor | None = None
    spreads: bool = False
    keys: Tensor | None = None


EVERYTHING = Plan()


class Policy(nn.Module, ABC):
    """Base of all policies; built once for each block.

    Args:
        embed_dims: Channels of the tokens.
        scopes: Scopes that the block can compute.
        class_token: Whether the block has a class token.
        scorer: Name of a registered scorer, or a dict with its ``type`` and arguments; None for
            the default of the policy.
        scope: What is a unit and among which units the best are chosen; None for the default.
        rounding: How the number of active units is rounded: ``nearest``, ``floor`` or ``ceil``.

    Raises:
        ValueError: Unknown scope, scorer or rounding, or one that this policy or block cannot use.
        TypeError: The scorer does not take an argument given to it.
    """

    # Scopes that the policy can rank in, the default first.
    SCOPES: ClassVar[tuple[str, ...]] = ('map',)
    # Scorer with a class token; without one it is DEFAULT_SCORER.
    CLASS_TOKEN_SCORER: ClassVar[str] = DEFAULT_SCORER
    # Whether each block ranks by its own scores, so that every scorer learns.
    TRAINS_SCORER: ClassVar[bool] = False
    # Whether the policy can rank by the attention that its own block has just computed.
    REORGANISES: ClassVar[bool] = False
    # Whether idle tokens serve as keys and values; in spatial-reduction attention they always do.
    idle_context: bool = False

    def __init__(
        self,
        embed_dims: int,
        scopes: tuple[str, ...] = ('map',),
        class_token: bool = False,
        scorer: str | dict[str, Any] | None = None,
        scope: str | None = None,
        rounding: str = 'nearest',
    ) -> None:
        super().__init__()
        name = type(self).__name__
        allowed = [known for known in self.SCOPES if known in scopes]
        if not allowed:
            raise ValueError(
                f'policy={name!r} ranks in scope {" or ".join(self.SCOPES)}, which this backbone '
                f'has not; allowed scopes here: {", ".join(scopes)}'
            )
        self.scope = allowed[0] if scope is None else scope
        if self.scope not in allowed:
            raise ValueError(
                f'policy.scope={scope!r} is unknown here; allowed: {", ".join(allowed)}'
            )
        if rounding not in ROUNDINGS:
            raise ValueError(
                f'policy.rounding={rounding!r} is unknown; allowed: {", ".join(ROUNDINGS)}'
            )
        self.rounding = rounding
        if scorer is None:
            scorer = self.CLASS_TOKEN_SCORER if class_token else DEFAULT_SCORER
        self.scorer: Scorer = build_from(SCORERS, 'policy.scorer', scorer, embed_dims=embed_dims)
        if self.scorer.needs_class_token and not class_token:
            raise ValueError(
                f'policy.scorer={scorer!r} needs a class token, which this backbone has not'
            )
        if self.scorer.learns and not self.TRAINS_SCORER:
            raise ValueError(
                f'policy.scorer={scorer!r} learns, which {name} has no gradient for; allowed with '
                'policy IdleViT'
            )
        if self.scorer.ranks_after_attention and not self.REORGANISES:
            raise ValueError(
                f'policy.scorer={scorer!r} is known only after the attention of a block, and '
                f'{name} chooses before it; allowed with policies EViT and EvoViT'
            )

    @abstractmethod
    def plan(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        keep_ratio: float,
        block: ScorableBlock,
        memory: Any = None,
    ) -> tuple[Plan, Any]:
        """Decide what a block does, before its attention.

        Args:
            x: (B, P + N, C), the tokens as they enter the block.
            hw_shape: Height and width of the map in tokens.
            keep_ratio: Share of the units that is active, in (0, 1].
            block: The block that asks.
            memory: What the policy returned at the block before; None at the start of a stage.

        Returns:
            The plan and what to remember until the next block.
        """

    def uses_attention(self, keep_ratio: float) -> bool:
        """Whether ``reorganise`` is to be called in a block of this keep ratio."""
        return self.scorer.ranks_after_attention

    def reorganise(
        self,
        x: Tensor,
        active: Tensor,
        attention: Tensor,
        plan: Plan,
        keep_ratio: float,
        num_prefix: int,
        memory: Any,
    ) -> tuple[Tensor, Tensor, Plan, Any]:
        """Use the attention of the class token, after the attention of a block and before its MLP.

        Called only where ``uses_attention``.

        Args:
            x: (B, P + N, C), the tokens as they entered the block.
            active: (B, T, C), the active tokens after attention.
            attention: (B, T), attention of the class token to each, mean over heads.
            plan: What the block did so far.
            keep_ratio: Share of the units that is active, in (0, 1].
            num_prefix: P.
            memory: What ``plan`` returned.

        Returns:
            x, the active tokens that go on, what to do with them, and the memory.
        """
        raise NotImplementedError(f'{type(self).__name__} chooses before attention')

    def check_keep_ratios(self, keep_ratios: Sequence[Sequence[float]]) -> None:
        """Refuse ratios that this policy cannot follow.

        Args:
            keep_ratios: One list per stage with one ratio per block.

        Raises:
            ValueError: The ratios of a stage do not fit the policy.
        """

    def scores(self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock) -> Tensor:
        """Score of each token of the map: (B, N), with gradient only if the scorer learns."""
        return self.score(x, hw_shape, block)[0]

    def score(
        self, x: Tensor, hw_shape: tuple[int, int], block: ScorableBlock
    ) -> tuple[Tensor, Tensor | None]:
        """Scores as ``scores`` returns them, and keys that the scorer computed on the way."""
        if not self.scorer.needs_class_token:
            x = block.map_tokens(x, hw_shape)
        # Half precision cannot tell close scores apart, and would rank differently under autocast;
        # but a model that is in half precision as a whole has no other weights.
        device = x.device.type
        mixed = autocasts(device)
        bound = self.scorer.uses_weights and not mixed
        exact = x if bound or x.dtype == torch.float64 else x.float()
        with full_precision(device):
            return self.scorer.score(exact, hw_shape, block, with_keys=not mixed)


def chosen(token_ids: Tensor) -> Selection:
    """Selection of single tokens: token_ids (B, T), ascending."""
    return Selection(token_ids, token_ids, False)


def positive(scores: Tensor) -> Tensor:
    """Scores as weights of a mean: negative ones, and exact zeros, count next to nothing."""
    return scores.clamp(min=torch.finfo(scores.dtype).tiny)


def build_policy(
    policy: str | dict[str, Any] | None,
    embed_dims: int,
    scopes: tuple[str, ...],
    class_token: bool = False,
) -> Policy:
    """Build the policy of one block from a config.

    Args:
        policy: None for the default, the name of a registered policy, or a dict with its arguments
            and optionally its ``type``.
        embed_dims: Channels of the tokens.
        scopes: Scopes that the block can compute.
        class_token: Whether the block has a class token.

    Raises:
        TypeError: The policy or its scorer does not take an argument given to it.
        ValueError: Unknown policy or scorer, or a value that is not allowed.
    """
    if policy is None:
        policy = {}
    if isinstance(policy, dict):
        policy = {'type': DEFAULT_POLICY, **policy}
    given = dict(embed_dims=embed_dims, scopes=scopes, class_token=class_token)
    return build_from(POLICIES, 'policy', policy, **given)
