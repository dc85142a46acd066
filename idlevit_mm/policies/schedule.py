"""Keep ratios as users write them, normalised once to one ratio per block."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any

KeepRatios = float | Sequence[float | Sequence[float]] | Mapping[str, Any]

_ALLOWED = (
    'a number in {least}0, 1], or a list with one entry per stage (depths {depths}), each entry a '
    'number or a list with one number per block of that stage; for a backbone of one stage also a '
    "list with one number per block; or dict(type='powers', keep_ratio=..., first_idle=0, "
    "groups=3), dict(type='evit', keep_ratio=..., blocks=[3, 6, 9]), "
    "dict(type='3+3+2', keep_ratio=...) (or 3+3+3, 4+4+4, 5+5+5) or dict(type='sparsevit-35ms') "
    '(or -42ms, -33ms)'
)
# IdleViT's groups of idle blocks: DeiT in training, DeiT in evaluation, LV-ViT-S, LV-ViT-M.
_GROUPS = {'3+3+2': (3, 3, 2), '3+3+3': (3, 3, 3), '4+4+4': (4, 4, 4), '5+5+5': (5, 5, 5)}
# Shares of idle windows that SparseViT found for Swin-T, of each pair of blocks of each stage.
_SPARSEVIT = {
    'sparsevit-42ms': ((0.3,), (0.0,), (0.1, 0.2, 0.2), (0.0,)),
    'sparsevit-35ms': ((0.6,), (0.0,), (0.2, 0.4, 0.5), (0.0,)),
    'sparsevit-33ms': ((0.7,), (0.0,), (0.2, 0.4, 0.5), (0.0,)),
}


def normalize_keep_ratios(
    keep_ratios: KeepRatios,
    depths: Sequence[int],
    name: str = 'keep_ratios',
    nothing: bool = False,
) -> list[list[float]]:
    """Spread keep ratios over stages and blocks; what it returns it leaves as it is.

    Args:
        keep_ratios: One ratio for all blocks, one per stage, or one list per stage with one ratio
            per block; numbers and lists may be mixed between stages. For a backbone of one stage
            also a flat list with one ratio per block. Or a schedule by name, counting blocks over
            the whole network from 0: ``dict(type='powers', keep_ratio=r, first_idle=0, groups=3)``
            gives the blocks from ``first_idle`` on, in ``groups`` equal groups, r, r^2, r^3
            (IdleViT, arXiv 2310.05654); ``dict(type='evit', keep_ratio=r, blocks=[3, 6, 9])``
            gives only those blocks r (EViT, arXiv 2202.07800); ``dict(type='3+3+2',
            keep_ratio=r)`` gives the last blocks, in groups of these sizes, r, r^2, r^3, also
            ``3+3+3``, ``4+4+4`` and ``5+5+5``. Other blocks are dense. ``dict(
            type='sparsevit-35ms')`` is SparseViT's for Swin-T (arXiv 2303.17605), also ``-42ms``
            and ``-33ms``.
        depths: Number of blocks of each stage.
        name: What errors call the ratios.
        nothing: Whether 0 is allowed.

    Returns:
        One list per stage with one ratio in (0, 1] per block.

    Raises:
        TypeError: An entry is neither a number nor a list, or a schedule has an unknown key.
        ValueError: A ratio lies outside (0, 1] or is not finite, a list has the wrong length, or
            a schedule is unknown or does not fit the number of blocks.
    """
    try:
        if isinstance(keep_ratios, Mapping):
            blocks = iter(_schedule(keep_ratios, depths))
            stages: list[Any] = [list(islice(blocks, depth)) for depth in depths]
        else:
            stages = _stages(keep_ratios, depths)
        return [
            _stage_ratios(stage, index, depth, nothing)
            for index, (stage, depth) in enumerate(zip(stages, depths, strict=True))
        ]
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        allowed = _ALLOWED.format(depths=tuple(depths), least='[' if nothing else '(')
        raise kind(f'{name}={keep_ratios!r} {error}; allowed: {allowed}') from None


def checked_ratio(value: Any, subject: str, nothing: bool = False) -> float:
    """Return a keep ratio as a float; errors begin with ``subject``, such as ``'low is'``.

    Raises:
        TypeError: The value is no number.
        ValueError: The value lies outside (0, 1] or is not finite; 0 is allowed with ``nothing``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{subject} {value!r}, which is not a number')
    ratio = float(value)
    if not math.isfinite(ratio) or not 0.0 <= ratio <= 1.0 or not (nothing or ratio):
        raise ValueError(f'{subject} {value!r}, which is not in {"[" if nothing else "("}0, 1]')
    return ratio


def _stages(keep_ratios: Any, depths: Sequence[int]) -> list[Any]:
    """Entry of each stage, without looking inside."""
    if not _is_list(keep_ratios):
        return [keep_ratios] * len(depths)
    stages = list(keep_ratios)
    if len(stages) == len(depths):
        return stages
    if [len(stages)] == list(depths):
        return [stages]
    wanted = f'{len(depths)} stages' if len(depths) > 1 else f'1 stage of {depths[0]} blocks'
    raise ValueError(f'has {len(stages)} entries for {wanted}')


def _stage_ratios(stage: Any, index: int, depth: int, nothing: bool) -> list[float]:
    if not _is_list(stage):
        return [checked_ratio(stage, 'holds', nothing)] * depth
    if len(stage) != depth:
        raise ValueError(f'has {len(stage)} entries for the {depth} blocks of stage {index}')
    return [checked_ratio(value, 'holds', nothing) for value in stage]


def _schedule(config: Mapping[str, Any], depths: Sequence[int]) -> list[float]:
    """Ratio of each block of the network, from a schedule's name and its arguments."""
    options = dict(config)
    name = options.pop('type', None)
    if not isinstance(name, str) or name not in _SCHEDULES:
        raise ValueError(f'has type {name!r}, which is not one of {", ".join(_SCHEDULES)}')
    # Its TypeError names a key that is wrong or missing.
    inspect.signature(_SCHEDULES[name]).bind(depths, **options)
    return _SCHEDULES[name](depths, **options)


def _grouped(sizes: Sequence[int], depths: Sequence[int], keep_ratio: Any) -> list[float]:
    ratio, dense = checked_ratio(keep_ratio, 'holds'), sum(depths) - sum(sizes)
    if dense < 0:
        raise ValueError(f'idles in {sum(sizes)} blocks of {sum(depths)}')
    return [1.0] * dense + [
        ratio**power for power, size in enumerate(sizes, 1) for _ in range(size)
    ]


def _powers(
    depths: Sequence[int], keep_ratio: Any, first_idle: Any = 0, groups: Any = 3
) -> list[float]:
    total = sum(depths)
    idle = total - _checked_int(first_idle, 'first_idle', 0, total - 1)
    groups = _checked_int(groups, f'groups (of {idle} idle blocks)', 1, idle)
    size, larger = divmod(idle, groups)
    return _grouped([size + (index < larger) for index in range(groups)], depths, keep_ratio)


def _evit(depths: Sequence[int], keep_ratio: Any, blocks: Any = (3, 6, 9)) -> list[float]:
    ratio, total = checked_ratio(keep_ratio, 'holds'), sum(depths)
    if not _is_list(blocks) or not blocks:
        raise TypeError(f'has blocks={blocks!r}, which is not a list of block numbers')
    chosen = {_checked_int(block, 'blocks', 0, total - 1) for block in blocks}
    if len(chosen) < len(blocks):
        raise ValueError(f'names a block twice in blocks={blocks!r}')
    return [ratio if block in chosen else 1.0 for block in range(total)]


def _paired(shares: Sequence[Sequence[float]], depths: Sequence[int]) -> list[float]:
    own = tuple(2 * len(stage) for stage in shares)
    if own != tuple(depths):
        raise ValueError(f'is for depths {own}, not {tuple(depths)}')
    return [1 - share for stage in shares for share in stage for _ in range(2)]


_SCHEDULES: dict[str, Callable[..., list[float]]] = {
    'powers': _powers,
    'evit': _evit,
    **{name: partial(_grouped, sizes) for name, sizes in _GROUPS.items()},
    **{name: partial(_paired, shares) for name, shares in _SPARSEVIT.items()},
}


def _checked_int(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'holds {value!r} for {name}, which is not a whole number')
    if not low <= value <= high:
        raise ValueError(f'holds {value} for {name}, which is not in {low} to {high}')
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
