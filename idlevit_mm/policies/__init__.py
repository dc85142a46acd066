"""Policies decide which units of a block are active; scorers rank the tokens for them."""

from .policy import IdleViT, build_policy
from .schedule import KeepRatios, normalize_keep_ratios
from .scorers import (
    ActivationNorm,
    MeanDistance,
    MeanQuery,
    Random,
    ScorableBlock,
    Scorer,
    UniformGrid,
)

__all__ = [
    'ActivationNorm',
    'IdleViT',
    'KeepRatios',
    'MeanDistance',
    'MeanQuery',
    'Random',
    'ScorableBlock',
    'Scorer',
    'UniformGrid',
    'build_policy',
    'normalize_keep_ratios',
]
