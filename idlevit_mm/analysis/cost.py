"""Predicted times of blocks, on the device at hand and on others."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from ..backbones import IdleBackbone
from ..blocks import idle_work, seconds
from ..kernels import PACES, Pace


def stage_seconds(
    backbone: IdleBackbone, pace: Pace, dtype: torch.dtype, keep_ratio: float | None = None
) -> list[float]:
    """Predicted time of the blocks of each stage, for the images of the last forward pass.

    As they ran, or at one keep ratio for all blocks.

    Raises:
        NotImplementedError: A block does not say what it costs.
    """
    times = []
    stages = zip(backbone.idle_blocks, backbone.keep_ratios, backbone.records, strict=True)
    for blocks, ratios, record in stages:
        total = 0.0
        for block, ratio, plan in zip(blocks, ratios, record.plans, strict=True):
            share = keep_ratio or (1.0 if plan.rows is None else ratio)
            total += seconds(idle_work(block, record.batch, record.hw_shape, share), pace, dtype)
        times.append(total)
    return times


def predicted_speedups(
    backbone: IdleBackbone, names: Sequence[str], ratios: Sequence[float], dtype: torch.dtype
) -> pd.DataFrame:
    """Speed-up of all blocks over keep ratio 1.0: a row for each of ``PACES``, a column a ratio.

    For the images of the last forward pass; what lies between the stages is not counted.

    Raises:
        NotImplementedError: A block does not say what it costs.
    """

    def total(name: str, ratio: float) -> float:
        return sum(stage_seconds(backbone, PACES[name], dtype, ratio))

    return pd.DataFrame(
        {f'keep {r:g}': [total(name, 1.0) / total(name, r) for name in names] for r in ratios},
        index=list(names),
    )
