"""Keep ratios as users write them, normalised once to one ratio per block."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

KeepRatios = float | Sequence[float | Sequence[float]]

_ALLOWED = (
    'a number in (0, 1], or a list with one entry per stage {depths}, each entry a number or a '
    'list with one number per block of that stage'
)


def normalize_keep_ratios(keep_ratios: KeepRatios, depths: Sequence[int]) -> list[list[float]]:
    """Spread keep ratios over stages and blocks.

    Args:
        keep_ratios: One ratio for all blocks, one per stage, or one list per stage with one ratio
            per block; numbers and lists may be mixed between stages.
        depths: Number of blocks of each stage.

    Returns:
        One list per stage with one ratio in (0, 1] per block.

    Raises:
        TypeError: An entry is neither a number nor a list.
        ValueError: A ratio lies outside (0, 1] or is not finite, or a list has the wrong length.
    """
    stages: list[Any]
    if _is_list(keep_ratios):
        stages = list(cast(Sequence[Any], keep_ratios))
        if len(stages) != len(depths):
            raise ValueError(
                _message(keep_ratios, depths, f'has {len(stages)} entries for {len(depths)} stages')
            )
    else:
        stages = [keep_ratios] * len(depths)
    return [
        _stage_ratios(stage, index, depth, keep_ratios, depths)
        for index, (stage, depth) in enumerate(zip(stages, depths, strict=True))
    ]


def _stage_ratios(
    stage: Any, index: int, depth: int, keep_ratios: Any, depths: Sequence[int]
) -> list[float]:
    if not _is_list(stage):
        return [_ratio(stage, keep_ratios, depths)] * depth
    if len(stage) != depth:
        problem = f'has {len(stage)} entries for the {depth} blocks of stage {index}'
        raise ValueError(_message(keep_ratios, depths, problem))
    return [_ratio(value, keep_ratios, depths) for value in stage]


def _ratio(value: Any, keep_ratios: Any, depths: Sequence[int]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        problem = f'holds {value!r}, which is not a number'
        raise TypeError(_message(keep_ratios, depths, problem))
    ratio = float(value)
    if not math.isfinite(ratio) or not 0.0 < ratio <= 1.0:
        raise ValueError(_message(keep_ratios, depths, f'holds {ratio}, which is not in (0, 1]'))
    return ratio


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _message(keep_ratios: Any, depths: Sequence[int], problem: str) -> str:
    allowed = _ALLOWED.format(depths=f'(depths {tuple(depths)})')
    return f'keep_ratios={keep_ratios!r} {problem}; allowed: {allowed}'
