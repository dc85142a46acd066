"""Windows with random active tokens, for the tests of attention in windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from idlevit_mm.ops import WindowLayout, window_layout

CPU = torch.device('cpu')


@dataclass(frozen=True)
class Problem:
    """A batch of maps of which some tokens are active.

    Args:
        hw_shape: Height and width of the map in tokens.
        window: Side of a window in tokens.
        shift: Cyclic shift of the windows in tokens.
        active: (B, T), ids of the active tokens of each image.
        summarised: Whether each window has a row for the summary of its idle tokens.
        hides_padding: Whether padding is no key.
    """

    hw_shape: tuple[int, int]
    window: int
    shift: int
    active: Tensor
    summarised: bool = False
    hides_padding: bool = False

    @property
    def layout(self) -> WindowLayout:
        return window_layout(*self.hw_shape, self.window, self.shift, self.hides_padding, CPU)

    @property
    def slots(self) -> int:
        """Slots of a window."""
        return self.window**2

    @property
    def batch(self) -> int:
        return len(self.active)

    @property
    def rows(self) -> int:
        """Packed rows of an image."""
        return self.active.shape[1] + self.summarised * len(self.layout.token_ids)

    def occupied(self) -> dict[tuple[int, int], list[int]]:
        """Slots that have a place, ascending, of each (image, window) that has any; L: summary."""
        slots = self.slots
        found = {}
        for image, active in enumerate(self.active.tolist()):
            chosen = set(active)
            for window, tokens in enumerate(self.layout.token_ids.tolist()):
                mine = [slot for slot, token in enumerate(tokens) if token in chosen]
                padding = [slot for slot, token in enumerate(tokens) if token < 0]
                idle = len(mine) + len(padding) < slots
                padding = [] if self.hides_padding else padding
                summary = [slots] if self.summarised and idle else []
                if mine or summary:
                    found[image, window] = sorted(mine + padding) + summary
        return found

    def row(self, image: int, window: int, slot: int) -> int | None:
        """Number of the packed row in a slot; None for padding."""
        if slot == self.slots:
            return image * self.rows + self.active.shape[1] + window
        token = int(self.layout.token_ids[window, slot])
        if token < 0:
            return None
        return image * self.rows + self.active[image].tolist().index(token)

    def region(self, window: int, slot: int) -> int:
        """Region of a slot; -1 where it sees all slots of its window."""
        first = len(self.layout.token_ids) - len(self.layout.regions)
        if window < first or slot == self.slots:
            return -1
        return int(self.layout.regions[window - first, slot])


def problem(
    height: int,
    width: int,
    window: int,
    shift: int = 0,
    count: int | None = None,
    batch: int = 1,
    summarised: bool = False,
    hides_padding: bool = False,
    seed: int = 0,
) -> Problem:
    """``count`` random tokens of each image are active; all where it is None."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, height * width, generator=generator)
    active = scores.topk(height * width if count is None else count).indices.sort().values
    return Problem((height, width), window, shift, active, summarised, hides_padding)


@st.composite
def problems(draw: st.DrawFn, most: int = 15, windows: tuple[int, int] = (1, 7)) -> Problem:
    """Odd maps, windows and shifts, from one active token to all, with and without summaries."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    window = draw(st.integers(*windows))
    tokens = height * width
    # Padding is hidden where both sides are padded and windows are not shifted.
    shift = draw(st.sampled_from((0, window // 2)))
    hidden = shift == 0 and height % window > 0 and width % window > 0 and draw(st.booleans())
    return problem(
        height,
        width,
        window,
        shift=shift,
        hides_padding=hidden,
        count=draw(st.one_of(st.just(1), st.just(tokens), st.integers(1, tokens))),
        batch=draw(st.integers(1, 3)),
        summarised=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


def full_and_idle_windows(window: int) -> Problem:
    """Every other window has all its tokens active, the others none; many of both."""
    hw_shape = 5 * window, 10 * window
    layout = window_layout(*hw_shape, window, 0, CPU)
    active = layout.token_ids[::2].reshape(1, -1).sort().values
    return Problem(hw_shape, window, 0, active, summarised=True)
