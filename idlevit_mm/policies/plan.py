"""What a block is told to do, and what a policy decides between its halves: data, no code.

Shape letters: B images, N tokens of the map (H * W), T computed rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from ..ops import Rows


class Plan(NamedTuple):
    """All that a block does.

    Attributes:
        rows: Rows that are computed, class tokens aside, which always are; None for all of x.
        keys: Which rows serve as keys and values, where the attention leaves a choice.
        summary: (B, N), weight of each idle token in the summary of its group, 0 for active
            tokens; None for no summaries. Of which groups, the family knows.
        spread: Whether idle tokens receive what is added to their summary.
        gate: (B, T), zeros that carry the gradient of the scores; None if no score learns.
        ask: Whether the policy wants the class token's attention between the halves.
        hold: Whether rows may stay packed for a next block that computes the same ones.
        pads_first: Whether padding of windows is zero before the norm, and not after it.
        attends: What the attention half does, where fewer rows attend; None where it is the same,
            ``nothing`` where no row does.
    """

    rows: Rows | None = None
    keys: Literal['rows', 'all'] = 'rows'
    summary: Tensor | None = None
    spread: bool = False
    gate: Tensor | None = None
    ask: bool = False
    hold: bool = False
    pads_first: bool = False
    attends: Plan | Literal['nothing'] | None = None

    def but(self, **changes: object) -> Plan:
        """The same with some changes."""
        # Not by _replace: torch.compile cannot return the tuple that it makes.
        return Plan(**{**self._asdict(), **changes})  # type: ignore[arg-type]


EVERYTHING = Plan()


class Regroup(NamedTuple):
    """What happens to the computed rows between the halves.

    Attributes:
        keep: (B, K), places among the T rows that go on, ascending; the others are idle from here.
        fuse: (B, T), weights of one row that is appended to x and goes on; None for none.
    """

    keep: Tensor
    fuse: Tensor | None = None
