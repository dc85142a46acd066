"""The sequence of an idle block: score, select, gather, compute, scatter.

Shape letters: B images, N tokens of the map (H * W), T active tokens, C channels, A heads.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import Selection, UnitLayout, map_units, put_tokens, take_tokens
from ..policies import build_policy


class IdleBlock(BaseModule, ABC):
    """A transformer block that computes only the active tokens of a map.

    A family implements ``compute`` and ``mean_query_attention``, and extends ``SCOPES`` and
    ``unit_layout`` where it knows more than whole-map selection.

    Args:
        embed_dims: Channels of the tokens.
        policy: Config of the idling policy; None for the default.
        with_cp: Whether to recompute the block in the backward pass instead of storing it.
    """

    SCOPES: tuple[str, ...] = ('map',)

    def __init__(
        self, embed_dims: int, policy: dict[str, Any] | None = None, with_cp: bool = False
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.policy = build_policy(policy, embed_dims, self.SCOPES)

    def forward(
        self, x: Tensor, hw_shape: tuple[int, int], keep_ratio: float = 1.0
    ) -> tuple[Tensor, Selection | None]:
        """Run the block.

        Args:
            x: (B, N, C), the map.
            hw_shape: Height and width of the map in tokens.
            keep_ratio: Share of the units that is active; 1.0 is the dense block, without scoring
                and gathering.

        Returns:
            The map (B, N, C), idle rows bit-identical, and which units were active; None where all
            of them were.
        """
        # torch.compile traces a second image size with symbolic sides; index tables need numbers.
        hw_shape = len(range(hw_shape[0])), len(range(hw_shape[1]))
        # Selected outside the checkpoint: a recomputation must not choose other tokens.
        selection = self.select(x, hw_shape, keep_ratio) if keep_ratio < 1.0 else None
        if self.with_cp and x.requires_grad:
            x = checkpoint(self._run, x, hw_shape, selection, use_reentrant=False)
        else:
            x = self._run(x, hw_shape, selection)
        return x, selection

    def select(self, x: Tensor, hw_shape: tuple[int, int], keep_ratio: float) -> Selection:
        """Choose the active units of the map x (B, N, C)."""
        layout = self.unit_layout(hw_shape, x.device)
        return self.policy.select(x, hw_shape, layout, keep_ratio, self)

    def unit_layout(self, hw_shape: tuple[int, int], device: torch.device) -> UnitLayout:
        """Units among which the policy chooses."""
        return map_units(*hw_shape, device)

    @abstractmethod
    def compute(
        self, active: Tensor, x: Tensor, hw_shape: tuple[int, int], selection: Selection | None
    ) -> Tensor:
        """Dense maths of the block on packed tokens.

        Args:
            active: (B, T, C), the active tokens; the whole map where ``selection`` is None.
            x: (B, N, C), the whole map, for blocks whose idle tokens serve as context.
            hw_shape: Height and width of the map in tokens.
            selection: Which units are active.

        Returns:
            (B, T, C), the new active tokens.
        """

    @abstractmethod
    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean token's query to every token of the map x (B, N, C): (B, A, N)."""

    def _run(self, x: Tensor, hw_shape: tuple[int, int], selection: Selection | None) -> Tensor:
        if selection is None:
            return self.compute(x, x, hw_shape, None)
        active = self.compute(take_tokens(x, selection), x, hw_shape, selection)
        return put_tokens(x, selection, active)
