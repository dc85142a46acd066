"""What all policies share: which tokens of a block are active, and what the idle ones receive.

A policy gets numbers and returns data; it never sees features or a block, and keeps nothing between
forward passes. The last plan and a *state* of its own are handed from block to block of a stage.

Shape letters: B images, N tokens of the map (H * W), T rows in play.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import Units
from ..registry import POLICIES, SCORERS, build_from
from .plan import Plan, Regroup
from .schedule import KeepRatios
from .scorers import Scorer
from .select import ROUNDINGS, num_active

DEFAULT_POLICY = 'IdleViT'


class Policy(nn.Module, ABC):
    """Base of all policies; built once for each block.

    Args:
        embed_dims: Channels of the tokens.
        scopes: Scopes that the block can compute.
        class_token: Whether the block has a class token.
        cells: Whether the block can have a summary of each cell of the map.
        scorer: Name of a registered scorer, or a dict with its ``type`` and arguments; None for
            the default of the policy.
        scope: What is a unit and among which units the best are chosen; None for the default.
        rounding: How the number of active units is rounded: ``nearest``, ``floor`` or ``ceil``.
        summary_size: Side in tokens of the cells whose idle tokens have a summary each, where the
            policy makes some; None for one summary of the map. Windows have their own.
        attention_ratios: Share of the units that attend in idle blocks, written like keep ratios:
            the best of the active ones, where it is smaller than the keep ratio. The others go
            through the MLP alone. None: all that are active; 0: an idle block is its MLP alone.

    Raises:
        ValueError: Unknown scope, scorer or rounding, or one that this policy or block cannot use;
            or ``summary_size`` is no side.
        TypeError: The scorer does not take an argument given to it.

    Attributes:
        attention_ratio: That of its own block, set by the backbone.
    """

    # Scopes that the policy can rank in, the default first.
    SCOPES: ClassVar[tuple[str, ...]] = ('map',)
    # Scorers by default, without and with a class token.
    SCORER: ClassVar[str] = 'mean_distance'
    CLASS_TOKEN_SCORER: ClassVar[str] = 'mean_distance'
    # Whether each block ranks by its own scores, so that every scorer learns.
    TRAINS_SCORER: ClassVar[bool] = False
    # Whether the policy can rank by the attention that its own block has just computed.
    RANKS_BY_ATTENTION: ClassVar[bool] = False
    # Number of its block, counted over the whole network.
    place: int = 0
    attention_ratio: float = 1.0

    def __init__(
        self,
        embed_dims: int,
        scopes: tuple[str, ...] = ('map',),
        class_token: bool = False,
        cells: bool = True,
        scorer: str | dict[str, Any] | None = None,
        scope: str | None = None,
        rounding: str = 'nearest',
        summary_size: int | None = None,
        attention_ratios: KeepRatios | None = None,
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
        if summary_size is not None and not (type(summary_size) is int and summary_size > 0):
            raise ValueError(
                f'policy.summary_size={summary_size!r} must be a side in tokens, at least 1, or '
                'None for one summary of the map'
            )
        if summary_size and not cells:
            raise ValueError(
                f'policy.summary_size={summary_size}: each window of this backbone has a summary '
                'already; allowed: None'
            )
        self.summary_size, self.attention_ratios = summary_size, attention_ratios
        if scorer is None:
            scorer = self.CLASS_TOKEN_SCORER if class_token else self.SCORER
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
        if self.scorer.NEEDS == 'class_attention' and not self.RANKS_BY_ATTENTION:
            raise ValueError(
                f'policy.scorer={scorer!r} is known only after the attention of a block, and '
                f'{name} chooses before it; allowed with policies EViT and EvoViT'
            )

    def put(self, place: int, depths: Sequence[int]) -> None:
        """Learn which block it is of, when the network of stages of so many blocks is built.

        Raises:
            ValueError: Settings do not fit the number of blocks.
        """
        self.place = place

    def entering(self, state: Any, before: tuple[int, int], hw_shape: tuple[int, int]) -> Any:
        """State with which a stage begins: of that at the end of the stage before, and both maps.

        Stages begin anew unless a policy says otherwise.
        """
        return None

    def wants_scores(self, keep_ratio: float, state: Any) -> bool:
        """Whether ``plan`` needs scores of the tokens as they enter the block."""
        return keep_ratio < 1.0 and self.scorer.NEEDS != 'class_attention'

    @property
    def halves_differ(self) -> bool:
        """Whether fewer units may attend than are active."""
        return False

    def attending(self, keep_ratio: float) -> float:
        """Share of the units that attend; the keep ratio where all active ones do."""
        return min(keep_ratio, self.attention_ratio) if keep_ratio < 1.0 else keep_ratio

    def count(self, num_units: int, keep_ratio: float) -> int:
        """How many of a group of units are active."""
        return num_active(keep_ratio, num_units, self.rounding)

    @abstractmethod
    def plan(
        self, scores: Tensor | None, units: Units, keep_ratio: float, last: Plan, state: Any
    ) -> tuple[Plan, Any]:
        """Decide what a block does, before its attention.

        Args:
            scores: (B, N), higher is kept first, without gradient; None unless ``wants_scores``.
            units: Units of the map among which the best are chosen.
            keep_ratio: Share of the units that is active, in (0, 1].
            last: The plan in force after the block before; that of everything at a stage's start.
            state: What this returned at the block before; None at the start of a stage.

        Returns:
            The plan and what to remember until the next block.
        """

    def between(
        self, attention: Tensor, plan: Plan, keep_ratio: float, state: Any
    ) -> tuple[Regroup | None, Any]:
        """Say what happens to the rows before the MLP of a block, None for nothing; and the state.

        Called only where the plan asks. ``attention`` (B, T) is what the class token has paid to
        each computed row, mean over heads.
        """
        raise NotImplementedError(f'{type(self).__name__} chooses before attention')

    def check_attention_ratios(self, attention_ratios: Sequence[Sequence[float]]) -> None:
        """Refuse ratios, as those of ``check_keep_ratios``, that this policy cannot follow.

        Raises:
            ValueError: Fewer units are to attend than are active, which only policies can that rank
                in each block, before its attention.
        """
        if not self.halves_differ and any(min(stage) < 1.0 for stage in attention_ratios):
            raise ValueError(
                f'policy.attention_ratios={list(attention_ratios)} are for policies that rank in '
                'each block, before its attention: IdleViT, and EvoViT with rank_at=None and a '
                f'scorer other than class_attention; {type(self).__name__} can have None here'
            )

    def check_keep_ratios(self, keep_ratios: Sequence[Sequence[float]]) -> None:
        """Refuse ratios, a list per stage with one per block, that this policy cannot follow.

        Raises:
            ValueError: The ratios of a stage do not fit the policy.
        """


def positive(scores: Tensor, inside: Tensor | None = None) -> Tensor:
    """Scores (B, N) as weights of a mean: negative ones, and zeros, count next to nothing.

    Tokens that are not ``inside``, padding of their images, count nothing.
    """
    weights = scores.clamp(min=torch.finfo(scores.dtype).tiny)
    return weights if inside is None else weights.masked_fill(~inside, 0.0)


def build_policy(
    policy: str | dict[str, Any] | None,
    embed_dims: int,
    scopes: tuple[str, ...],
    class_token: bool = False,
    cells: bool = True,
) -> Policy:
    """Build the policy of one block from a config.

    ``policy`` is None for the default, the name of a registered policy, or a dict with its
    arguments and optionally its ``type``; the others are arguments of ``Policy``.

    Raises:
        TypeError: The policy or its scorer does not take an argument given to it.
        ValueError: Unknown policy or scorer, or a value that is not allowed.
    """
    if policy is None:
        policy = {}
    if isinstance(policy, dict):
        policy = {'type': DEFAULT_POLICY, **policy}
    given = dict(embed_dims=embed_dims, scopes=scopes, class_token=class_token, cells=cells)
    return build_from(POLICIES, 'policy', policy, **given)
