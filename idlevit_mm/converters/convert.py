"""Checkpoint files from one format to another."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..checkpoints import (
    BACKBONE,
    StateDict,
    WeightsReport,
    check_target,
    counted,
    read_weights,
    split_backbone,
    write_weights,
)
from ..errors import SettingError
from .formats import OPENMMLAB, Format, format_of, known_format
from .tables import (
    Fitted,
    Size,
    fit_pvt,
    fit_swin,
    fit_vit,
    pvt_pos_shapes,
    swin_pos_shape,
    vit_pos_shape,
)

# What a person asks for: mmdet and mmseg have the same names.
TARGETS = {
    'mmdet': OPENMMLAB,
    'mmseg': OPENMMLAB,
    'timm': 'timm',
    'official': 'official',
    'mmpretrain': 'mmpretrain',
}


class Converted(NamedTuple):
    """Weights in the format that was asked for.

    Attributes:
        weights: The weights.
        source: Format they had.
        target: Format they have.
        report: What became of each.
    """

    weights: StateDict
    source: Format
    target: Format
    report: WeightsReport


def convert_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    window_size: int | None = None,
    img_size: Size | None = None,
) -> Converted:
    """Write the weights of a checkpoint in another format.

    Args:
        source: File, address, or ``timm://`` and the name of a model; of a backbone alone or of a
            whole detector or segmentor.
        target: A ``.pth`` or ``.safetensors`` file that does not exist.
        to: One of ``TARGETS``.
        window_size: As in ``convert_weights``.
        img_size: As in ``convert_weights``.

    Raises:
        UsageError: The source cannot be read or converted, or the target not written.
    """
    check_target(target)
    converted = convert_weights(read_weights(source), to, window_size, img_size, source)
    write_weights(converted.weights, target, converted.target.place)
    return converted


def convert_weights(
    weights: StateDict,
    to: str,
    window_size: int | None = None,
    img_size: Size | None = None,
    source: object = 'weights',
) -> Converted:
    """Bring weights to another format.

    Weights of a whole model keep necks and heads among OpenMMLab's names; of other formats only
    the backbone exists.

    Args:
        weights: Weights of a backbone alone or of a whole detector or segmentor.
        to: One of ``TARGETS``.
        window_size: Window in tokens for which Swin's bias tables are resized; None leaves them.
        img_size: Height and width in pixels for which absolute tables are resized; None leaves
            them.
        source: Where the weights come from, for messages.

    Raises:
        SettingError: The format is unknown, the other one cannot hold the weights, or there are no
            tables of the kind that shall be resized.
    """
    if to not in TARGETS:
        raise SettingError(f'to={to!r} is unknown; allowed: {", ".join(TARGETS)}')
    state, others = split_backbone(weights)
    found = known_format(state, source)
    goal = format_of(found.family, TARGETS[to])
    try:
        decoded = found.decode(state)
    except SettingError as error:
        raise SettingError(f'{source}: {error}') from error
    fitted = _resized(decoded.state, found, window_size, img_size)
    encoded = goal.encode(fitted.state)
    report = WeightsReport(
        resized=fitted.resized,
        # A weight that was made up on the way and is not wanted was never there.
        dropped=decoded.dropped + [key for key in encoded.dropped if key not in decoded.added],
        added=[key for key in decoded.added if key in encoded.state] + encoded.added,
    )
    prefix = ''
    if goal.is_foreign:
        report.dropped += _by_module(others)
        others = {}
    elif others or _wants_prefix(to, found):
        prefix = BACKBONE
    result = {f'{prefix}{key}': value for key, value in encoded.state.items()} | others
    report.matched = [key for key in result if key.removeprefix(prefix) not in report.added]
    return Converted(result, found, goal, report)


def _wants_prefix(to: str, found: Format) -> bool:
    """Whether the library's own class reads a backbone's weights with their prefix only."""
    return to == 'mmdet' and found.family == 'swin'


def _by_module(weights: StateDict) -> list[str]:
    """How many weights each module of a whole model has."""
    modules: dict[str, list[str]] = {}
    for key in weights:
        modules.setdefault(key.split('.')[0], []).append(key)
    return [f'{module}.* ({counted(keys)})' for module, keys in modules.items()]


def _resized(
    state: StateDict, found: Format, window_size: int | None, img_size: Size | None
) -> Fitted:
    if window_size is not None and (found.family != 'swin' or window_size < 1):
        raise SettingError(
            f'window_size={window_size} for {found.title}; allowed: positive, and for Swin alone'
        )
    has_table = {
        'swin': 'absolute_pos_embed' in state,
        'pvt': 'layers.0.1.0.pos_embed' in state,
        'vit': 'pos_embed' in state,
    }
    if img_size is not None and not has_table[found.family]:
        raise SettingError(
            f'img_size={img_size} for {found.title}: these weights have no absolute position table'
        )
    if found.family == 'swin':
        shape = None if img_size is None else swin_pos_shape(state, img_size)
        return fit_swin(state, window_size, shape)
    if img_size is None:
        return Fitted(state, {})
    if found.family == 'pvt':
        return fit_pvt(state, pvt_pos_shapes(state, img_size))
    num_prefix = int('cls_token' in state)
    shape = vit_pos_shape(state, img_size)
    return fit_vit(state, shape, num_prefix, 'bicubic', found.is_foreign)
