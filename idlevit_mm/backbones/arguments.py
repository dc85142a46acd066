"""What numbers the constructors of all families take, in one table."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from ..converters import Size
from ..registry import arguments_of

Rule = tuple[str, Callable[[Any], bool]]


def _whole(least: int) -> Rule:
    return f'whole numbers from {least} on', lambda value: value >= least and value % 1 == 0


_RULES: dict[str, Rule] = {
    **dict.fromkeys(('depths', 'num_layers', 'num_stages', 'num_heads', 'embed_dims'), _whole(1)),
    **dict.fromkeys(('in_channels', 'window_size', 'patch_size', 'patch_sizes'), _whole(1)),
    **dict.fromkeys(('strides', 'sr_ratios', 'img_size', 'pretrain_img_size'), _whole(1)),
    'windiow_sizes': _whole(1),
    **dict.fromkeys(
        ('paddings', 'num_registers', 'out_channels', 'window_block_indexes'), _whole(0)
    ),
    'pretrained_window_sizes': _whole(0),
    'layer_scale': ('numbers from 0 on', lambda value: value >= 0),
    **dict.fromkeys(('out_indices', 'frozen_stages'), _whole(-1)),
    **dict.fromkeys(('mlp_ratio', 'mlp_ratios'), ('numbers above 0', lambda value: value > 0)),
    **dict.fromkeys(
        ('drop_rate', 'attn_drop_rate'), ('numbers from 0 to 1', lambda value: 0 <= value <= 1)
    ),
    'drop_path_rate': ('numbers from 0 to below 1', lambda value: 0 <= value < 1),
}


def check_numbers(cls: type, given: Mapping[str, Any]) -> None:
    """Check the numbers among the given arguments of a backbone.

    Raises:
        ValueError: One is not allowed; the message has its name, its value and what is allowed.
    """
    known = arguments_of(cls)
    for name in _RULES.keys() & known.keys() & given.keys():
        value, (allowed, fits) = given[name], _RULES[name]
        if value is None:  # stands for a default of its own
            continue
        if _is_list(known[name].default) and not (_is_list(value) and value):
            raise ValueError(f'{name}={value!r} must be a list of {allowed}, one for each stage')
        if not all(isinstance(one, Real) and fits(one) for one in _entries(value)):
            raise ValueError(f'{name}={value!r}; allowed: {allowed}')


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _entries(value: Any) -> Iterator[Any]:
    for one in value if _is_list(value) else [value]:
        yield from _entries(one) if _is_list(one) else [one]


def table_size(img_size: int | Sequence[int], stride: int) -> Size:
    """Height and width in tokens of a position table for images of one or two numbers of pixels."""
    sizes = [int(side) for side in _entries(img_size)]
    if len(sizes) not in (1, 2) or min(sizes) < stride:
        raise ValueError(
            f'pretrain_img_size={img_size} must be one number or two, from {stride} on (a token)'
        )
    return sizes[0] // stride, sizes[-1] // stride


def pretrained_cfg(pretrained: Any, init_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """What ``init_cfg`` is for the deprecated spelling ``pretrained``."""
    if init_cfg is not None:
        raise ValueError('init_cfg and pretrained cannot be set at the same time')
    if not isinstance(pretrained, str):
        raise TypeError(f'pretrained={pretrained!r} must be a path or None')
    warnings.warn(
        "pretrained is deprecated; use init_cfg=dict(type='Pretrained', checkpoint=...)",
        DeprecationWarning,
        stacklevel=3,
    )
    return dict(type='Pretrained', checkpoint=pretrained)
