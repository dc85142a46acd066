"""Swin Transformer: names of the release and of timm.

The release (https://github.com/microsoft/Swin-Transformer) ends a stage with its patch merging,
timm (``swin_*``) begins the next one with it; older files of timm are like the release. The
detection and segmentation releases of the authors have the norms of the outputs besides.
"""

import re

from torch import Tensor

from ..checkpoints import StateDict
from ..layers import relative_position_index
from .renaming import Conversion, KeyMap, Rule, with_leaves
from .tables import TABLE_OF_BIAS, window_of_table

_BLOCK = (
    ('norm1', 'norm1'),
    ('attn.w_msa.qkv', 'attn.qkv'),
    ('attn.w_msa.proj', 'attn.proj'),
    ('norm2', 'norm2'),
    ('ffn.layers.0.0', 'mlp.fc1'),
    ('ffn.layers.1', 'mlp.fc2'),
)


def _from_release_order(value: Tensor) -> Tensor:
    """Reorder the last dimension of a merge's norm (4C,) or reduction (2C, 4C).

    The release concatenates the four patches of a merge as (top left, bottom left, top right,
    bottom right) with channels fastest; mmcv's ``PatchMerging`` unfolds row by row with channels
    slowest.
    """
    patches = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return patches.transpose(-1, -2).flatten(-2)


def _to_release_order(value: Tensor) -> Tensor:
    """The inverse of ``_from_release_order``."""
    patches = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return patches[..., [0, 2, 1, 3], :].flatten(-2)


def _rules(merge: str) -> tuple[Rule, ...]:
    """What release and timm share; ``merge`` is the number of the stage that has the merge."""
    ours, theirs = 'stages.{stage}.blocks.{block}.', 'layers.{stage}.blocks.{block}.'
    merges = (
        Rule(
            f'stages.{{stage}}.downsample.{part}.{{leaf}}',
            f'layers.{merge}.downsample.{part}.{{leaf}}',
            _from_release_order,
            _to_release_order,
        )
        for part in ('norm', 'reduction')
    )
    table = 'relative_position_bias_table'
    return (
        *with_leaves(
            (('patch_embed.projection', 'patch_embed.proj'), ('patch_embed.norm',) * 2), '', ''
        ),
        *with_leaves(_BLOCK, ours, theirs),
        Rule(f'{ours}attn.w_msa.{table}', f'{theirs}attn.{table}'),
        *merges,
    )


_OUTPUT_NORM = r'^norm\d+\.'
_INDEX = r'relative_position_index$'
# What stays of a classifier in files of mmseg 0.x and mmpretrain under OpenMMLab's names.
_CLASSIFIER = r'^head\.|^norm\.|\.attn_mask$'

_OFFICIAL = KeyMap(
    "the Swin release's",
    (
        *_rules('{stage}'),
        *with_leaves((('norm{stage}', 'norm{stage}'),), '', ''),
        Rule('absolute_pos_embed', 'absolute_pos_embed'),
    ),
    theirs_only=re.compile(f'{_CLASSIFIER}|{_INDEX}'),
    ours_only=re.compile(f'{_CLASSIFIER}|{_INDEX}'),
)
_TIMM = KeyMap(
    "timm's swin_*",
    _rules('{stage+1}'),
    theirs_only=re.compile(f'{_CLASSIFIER}|{_INDEX}'),
    ours_only=re.compile(f'{_CLASSIFIER}|{_INDEX}|{_OUTPUT_NORM}'),
)


def is_ours(state: StateDict) -> bool:
    """Whether names are those of mmdet's and mmseg's Swin."""
    return 'stages.0.blocks.0.attn.w_msa.qkv.weight' in state


def is_official(state: StateDict) -> bool:
    """Whether names are those of the Swin release."""
    return _has_blocks(state) and not is_timm(state)


def is_timm(state: StateDict) -> bool:
    """Whether names are those of timm's ``swin_*``."""
    merges = {key.split('.')[1] for key in state if '.downsample.' in key}
    return _has_blocks(state) and '1' in merges and '0' not in merges


def from_official(state: StateDict) -> Conversion:
    """Names of the release to OpenMMLab's.

    Dropped are the classifier, its norm and the masks that depend on the image size.

    Raises:
        SettingError: A weight has no counterpart (Swin V2, ...).
    """
    return _with_indices(_OFFICIAL.decode(state))


def to_official(state: StateDict) -> Conversion:
    """OpenMMLab's names to those of the release: the inverse of ``from_official``.

    Raises:
        SettingError: A weight has no counterpart.
    """
    return _with_indices(_OFFICIAL.encode(state))


def from_timm(state: StateDict) -> Conversion:
    """Names of timm's ``swin_*`` to OpenMMLab's; the classifier and its norm are dropped.

    Raises:
        SettingError: A weight has no counterpart (Swin V2, ...).
    """
    return _with_indices(_TIMM.decode(state))


def to_timm(state: StateDict) -> Conversion:
    """OpenMMLab's names to those of timm's ``swin_*``; the norms of the outputs are dropped.

    Raises:
        SettingError: A weight has no counterpart: timm's Swin has no absolute position table.
    """
    return _without_indices(_TIMM.encode(state))


def _has_blocks(state: StateDict) -> bool:
    return (
        'layers.0.blocks.0.attn.qkv.weight' in state
        and 'layers.0.blocks.0.attn.relative_position_bias_table' in state
    )


def _with_indices(conversion: Conversion) -> Conversion:
    """Add the index that belongs to each table; it follows from the window alone."""
    state: StateDict = {}
    for key, value in conversion.state.items():
        state[key] = value
        if key.endswith(TABLE_OF_BIAS):
            index = relative_position_index(window_of_table(value))
            state[key.removesuffix(TABLE_OF_BIAS) + 'relative_position_index'] = index
    return _without_indices(conversion._replace(state=state))


def _without_indices(conversion: Conversion) -> Conversion:
    """Indices are no loss, and not worth telling."""
    dropped = [key for key in conversion.dropped if not re.search(_INDEX, key)]
    return conversion._replace(dropped=dropped)
