"""What a block costs, and where idling pays.

A block is predicted from what it does: multiply-adds, numbers moved, operations launched, each at
the pace of a device. Decisions follow from sizes and that pace alone: they are the same on all
ranks, and a checkpoint, which holds the pace, repeats them on any device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..kernels import Pace, Site, pace_of, site_of

IDLE_WHERE = ('always', 'pays')
# Products of fewer rows take as long: weights must be read and laid out.
_FEW = 64
# What idling must save to be sure of it: predictions are off by as much.
_SURE = 0.95
_LOGGED = 32


class Work(NamedTuple):
    """What is to be done.

    Attributes:
        products: Multiply-adds of linear layers.
        pairs: Multiply-adds of attention and of depth-wise convolutions.
        moved: Numbers read or written.
        launches: Operations called one by one.
        choices: How often tokens are ranked, taken and put back.
    """

    products: float = 0.0
    pairs: float = 0.0
    moved: float = 0.0
    launches: float = 0.0
    choices: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def layers(rows: float, *widths: tuple[int, int]) -> Work:
    """Linear layers of some widths in and out, each on so many rows; weights are read, too."""
    if not rows:
        return Work()
    weights = sum(math.prod(pair) for pair in widths)
    moved = weights + rows * sum(map(sum, widths))
    return Work(max(rows, _FEW) * weights, 0.0, moved, len(widths))


def moves(numbers: float, launches: float) -> Work:
    """Numbers read and written by element-wise operations."""
    return Work(0.0, 0.0, numbers, launches)


def block_work(width: int, hidden: int, rows: float, attending: float, keys: float) -> Work:
    """A block of so many channels on some rows; some attend, each of them to so many keys."""
    linear = layers(attending, (width, 3 * width), (width, width))
    linear += layers(rows, (width, hidden), (hidden, width))
    pairs = Work(pairs=2 * width * attending * keys)
    moved = attending * 6 * width + rows * (3 * width + 2 * hidden)
    return linear + pairs + moves(moved, 8 if attending else 4)


def idle_work(block: Any, batch: int, hw_shape: tuple[int, int], keep_ratio: float) -> Work:
    """What an ``IdleBlock`` costs at a keep ratio: choosing, moving and computing rows."""
    area, width, policy = math.prod(hw_shape), block.embed_dims, block.policy
    shares = keep_ratio, policy.attending(keep_ratio)
    counts = [batch * policy.count(area, share) if share else 0 for share in shares]
    rows, attending = (n and n + batch * block.num_class for n in counts)
    work = block.computing(batch, hw_shape, rows, attending)
    if counts[1] == batch * area:
        return work
    # Read twice to be scored, then ranked; rows are taken and put back, by each half if it must.
    different = set(counts) - {0}
    moved = (2 * width + 8) * batch * area + 4 * width * sum(different)
    return work + moves(moved, 0) + Work(choices=len(different))


def seconds(work: Work, pace: Pace, dtype: torch.dtype) -> float:
    """Predicted time of some work in a precision: one thing after another."""
    is_half = dtype.itemsize == 2
    return (
        work.products / (pace.half if is_half else pace.single)
        + work.pairs / pace.pairs
        + work.moved * dtype.itemsize / pace.moved
        + (work.launches * pace.launch + work.choices * pace.choice) * 1e-9
    )


class Payer(nn.Module):
    """Says which blocks of a backbone idle: those that it makes faster.

    It knows the pace of the device of the first pass, and is saved with the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        # Whole numbers: who casts a model to half precision leaves them alone.
        self.register_buffer('rates', torch.zeros(len(Pace._fields), dtype=torch.int64))
        self._pace: Pace | None = None
        self._logged: set[tuple[Any, ...]] = set()

    def keep_ratio(
        self, block: Any, x: Tensor, hw_shape: tuple[int, int], keep_ratio: float
    ) -> float:
        """The keep ratio, or 1.0 where the dense block is predicted to be as fast.

        Of an idle block whose input is x (B, S, C).
        """
        if keep_ratio == 1.0:
            return keep_ratio
        site = site_of(x)
        pace, dtype = self._pace or self._paced(x.device, site), site.computing
        # An exported graph is for any number of images.
        batch = x.shape[0] if isinstance(x.shape[0], int) else 1
        works = [idle_work(block, batch, hw_shape, ratio) for ratio in (1.0, keep_ratio)]
        times = [seconds(work, pace, dtype) for work in works]
        pays = times[1] < _SURE * times[0]
        if site.eager and not pays:
            self._log(block, (batch, *hw_shape), keep_ratio, times)
        return keep_ratio if pays else 1.0

    def _paced(self, device: torch.device, site: Site) -> Pace:
        if not site.eager:
            return pace_of(device)
        if not self.rates.any():
            self.rates.copy_(torch.tensor(pace_of(device)))
        self._pace = Pace(*self.rates.tolist())
        return self._pace

    def _log(self, block: Any, shape: tuple[int, ...], ratio: float, times: list[float]) -> None:
        key = shape, block.embed_dims, ratio
        if key in self._logged or len(self._logged) >= _LOGGED:
            return
        self._logged.add(key)
        dense, idle = (f'{1000 * time:.3g}' for time in times)
        print_log(
            f"idle_where='pays': blocks of {block.embed_dims} channels on {shape[1]}x{shape[2]} "
            f'tokens (batch {shape[0]}) run dense: {dense} ms predicted, {idle} at keep ratio '
            f'{ratio:g}',
            'current',
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints of dense models have none; a pace of other parts is none of ours.
        given = state_dict.get(f'{prefix}rates')
        if given is None or given.shape != self.rates.shape:
            state_dict[f'{prefix}rates'] = self.rates
        self._pace = None
        super()._load_from_state_dict(state_dict, prefix, *args)
