"""What travels from block to block.

Shape letters: B images, S rows (the map, then class tokens, then what a policy has appended), T
computed rows, P class tokens, R summaries of idle tokens, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Extent, Rows
from ..policies import EVERYTHING, Plan


class Pack(NamedTuple):
    """The rows that a block computes, out of their places.

    Attributes:
        now: (B, T + P + R, C), computed rows, class tokens, summaries; x where all are computed.
        before: The same as x has it: as it was gathered, or last put back to be read. For gates and
            spreading.
        rows: Places in x of the first T + P; None where ``now`` is all of x.
        plan: What it was gathered for.
    """

    now: Tensor
    before: Tensor
    rows: Rows | None
    plan: Plan

    def holds(self, plan: Plan) -> bool:
        """Whether a block with this plan would gather the same again."""
        own = self.plan
        return (
            plan.hold
            and own.hold
            and own.rows is not None
            and plan.rows is not None
            # Wrappers of modules make new tuples of the same tensors.
            and plan.rows.ids is own.rows.ids
            and plan.summary is own.summary
        )


class Tokens(NamedTuple):
    """All tokens of a map; rows that are packed are out of date in x.

    Attributes:
        x: (B, S, C).
        hw_shape: Height and width of the map in tokens.
        pack: What is packed.
        normed: What a backend has made of x on the way for the attention: its norm, or the cells
            that its spatial reduction makes of it.
        owned: Whether nobody else holds x: it was made by the block before, or for the stage.
        centre: What a backend knows of the mean of each image's tokens.
    """

    x: Tensor
    hw_shape: tuple[int, int]
    pack: Pack | None = None
    normed: Tensor | None = None
    owned: bool = False
    centre: Any = None

    @property
    def now(self) -> Tensor:
        """What a block computes with: (B, T + P + R, C)."""
        return self.x if self.pack is None else self.pack.now

    def become(self, now: Tensor) -> Tokens:
        """The same with new computed rows."""
        assert self.pack is not None
        _, before, rows, plan = self.pack
        return Tokens(self.x, self.hw_shape, Pack(now, before, rows, plan), None, self.owned)

    def opened(self, now: Tensor, rows: Rows | None, plan: Plan) -> Tokens:
        """The same with computed rows."""
        return self._replace(pack=Pack(now, now, rows, plan), normed=None)

    def settled(self, x: Tensor) -> Tokens:
        """The same without a pack, whose rows are put back in x."""
        return Tokens(x, self.hw_shape, owned=self.owned)

    def made(self, x: Tensor) -> Tokens:
        """All tokens (B, S, C), made by this block."""
        # Of what is recorded for a backward pass, the graph may hold it.
        return Tokens(x, self.hw_shape, owned=not torch.is_grad_enabled())


class Carried(NamedTuple):
    """What a block hands to the next one beside x.

    Attributes:
        pack: Rows of x that stay packed; None where x is whole, as after every dense block.
        plan: What the block did.
        state: What its policy remembers.
        owned: Whether nobody but the next block holds x, which may write to it.
        extent: Which tokens belong to their images; None where all do. It is the stage's.
        centre: As in ``Tokens``.
    """

    pack: Pack | None = None
    plan: Plan = EVERYTHING
    state: Any = None
    owned: bool = False
    extent: Extent | None = None
    centre: Any = None
