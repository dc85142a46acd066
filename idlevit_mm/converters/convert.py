"""Checkpoint files from one format to another."""

import os
import re
from typing import Any, NamedTuple

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
from ..registry import idle_backbones
from .formats import OPENMMLAB, Format, format_of, known_format
from .tables import TABLE_OF_BIAS, Fitted, Size

# What a person asks for: mmdet and mmseg have the same names.
TARGETS = {
    'mmdet': OPENMMLAB,
    'mmseg': OPENMMLAB,
    **{name: name for name in ('timm', 'official', 'evovit', 'mmpretrain', 'dinov2')},
    **{name: name for name in ('huggingface', 'detectron2')},
}

# Classifiers of a plain ViT's release: of the class token, and LV-ViT's of every token.
_HEADS = r'(head|aux_head)\.(weight|bias)'


class Converted(NamedTuple):
    """Weights, the formats they had and have, and what became of each."""

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
    with_head: bool = False,
) -> Converted:
    """Write the weights of a checkpoint in another format; see ``convert_weights``.

    ``source`` is a file, an address, or ``timm://`` and the name of a model; ``target`` a ``.pth``
    or ``.safetensors`` file that does not exist.

    Raises:
        UsageError: The source cannot be read or converted, or the target not written.
    """
    check_target(target)
    converted = convert_weights(read_weights(source), to, window_size, img_size, source, with_head)
    write_weights(converted.weights, target, converted.target.place)
    return converted


def convert_weights(
    weights: StateDict,
    to: str,
    window_size: int | None = None,
    img_size: Size | None = None,
    source: object = 'weights',
    with_head: bool = False,
) -> Converted:
    """Bring weights to another format.

    Weights are of a backbone alone or of a whole model. That keeps necks and heads among
    OpenMMLab's names; of other formats only the backbone exists. Tables are resized for a window in
    tokens (Swin's bias tables) and for height and width in pixels (absolute ones) where these are
    given. ``source`` is where the weights come from, for messages. ``with_head`` keeps the
    classifier of a plain ViT's release, under the names of mmpretrain's ``ImageClassifier``.

    Raises:
        SettingError: The format is unknown, the other one cannot hold the weights, or there are no
            tables of the kind that shall be resized, or no classifier.
    """
    if to not in TARGETS:
        raise SettingError(f'to={to!r} is unknown; allowed: {", ".join(TARGETS)}')
    state, others = split_backbone(weights)
    found = known_format(state, source)
    family = next(cls for cls in idle_backbones() if found in cls.FORMATS)
    # OpenMMLab's names are those of the libraries of dense twins, but for mmpretrain's own of ViT.
    own = TARGETS[to] in (one.name for one in family.FORMATS) or to not in dict(family.DENSE)
    goal = format_of(found.family, TARGETS[to] if own else OPENMMLAB)
    heads = {k: v for k, v in state.items() if with_head and re.fullmatch(_HEADS, k)}
    if with_head and (found.family != 'vit' or goal.is_foreign or not heads):
        raise SettingError(
            f'with_head with to={to!r} and {source}; allowed: to mmseg, from a release of '
            'a plain ViT with its classifier'
        )
    others |= {f'head.layers.{key}': value for key, value in heads.items()}
    try:
        decoded = found.decode(state)
    except SettingError as error:
        raise SettingError(f'{source}: {error}') from error
    fitted = _resized(decoded.state, found, family, window_size, img_size)
    encoded = goal.encode(fitted.state)
    report = WeightsReport(
        resized=fitted.resized,
        # A weight that was made up on the way and is not wanted was never there.
        dropped=[key for key in decoded.dropped if key not in heads]
        + [key for key in encoded.dropped if key not in decoded.added],
        added=[key for key in decoded.added if key in encoded.state] + encoded.added,
    )
    prefix = ''
    if goal.is_foreign:
        modules: dict[str, list[str]] = {}
        for key in others:
            modules.setdefault(key.split('.')[0], []).append(key)
        report.dropped += [f'{module}.* ({counted(keys)})' for module, keys in modules.items()]
        others = {}
    elif others or to == goal.prefixed_for:
        prefix = BACKBONE
    result = {f'{prefix}{key}': value for key, value in encoded.state.items()} | others
    report.matched = [key for key in result if key.removeprefix(prefix) not in report.added]
    return Converted(result, found, goal, report)


def _resized(
    state: StateDict,
    found: Format,
    family: Any,
    window_size: int | None,
    img_size: Size | None,
) -> Fitted:
    has_windows = any(key.endswith(TABLE_OF_BIAS) for key in state)
    if window_size is not None and (not has_windows or window_size < 1):
        raise SettingError(
            f'window_size={window_size} for {found.title}; allowed: positive, and for Swin alone'
        )
    shapes = {} if img_size is None else family.table_shapes(state, img_size)
    if img_size is not None and not shapes:
        raise SettingError(
            f'img_size={img_size} for {found.title}: these weights have no absolute position table'
        )
    return family.fit_tables(state, shapes, window_size, found.is_foreign)
