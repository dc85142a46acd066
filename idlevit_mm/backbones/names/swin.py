"""Swin Transformer: names of the release and of timm.

The release (https://github.com/microsoft/Swin-Transformer) ends a stage with its patch merging,
timm (``swin_*``) begins the next one with it; older files of timm are like the release. The
detection and segmentation releases of the authors have the norms of the outputs besides.
"""

import re
from functools import partial

from torch import Tensor

from ...checkpoints import FOLLOWING, StateDict
from ...converters.formats import OPENMMLAB, Format, with_keys
from ...converters.renaming import Conversion, KeyMap, Rule, with_leaves
from ...converters.tables import INDEX_OF_BIAS, TABLE_OF_BIAS, index_of_table, window_of_table

_BLOCK = (
    ('norm1', 'norm1'),
    ('attn.w_msa.qkv', 'attn.qkv'),
    ('attn.w_msa.proj', 'attn.proj'),
    ('norm2', 'norm2'),
    ('ffn.layers.0.0', 'mlp.fc1'),
    ('ffn.layers.1', 'mlp.fc2'),
)


def from_release_order(value: Tensor) -> Tensor:
    """Reorder the last dimension of a merge's norm (4C,) or reduction (2C, 4C).

    The release concatenates the four patches of a merge as (top left, bottom left, top right,
    bottom right) with channels fastest; mmcv's ``PatchMerging`` unfolds row by row with channels
    slowest.
    """
    patches = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return patches.transpose(-1, -2).flatten(-2)


def to_release_order(value: Tensor) -> Tensor:
    """The inverse of ``from_release_order``."""
    patches = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return patches[..., [0, 2, 1, 3], :].flatten(-2)


OURS, THEIRS = 'stages.{stage}.blocks.{block}.', 'layers.{stage}.blocks.{block}.'
# What release and timm share in both versions of Swin, and what the releases have besides.
SHARED = (
    *with_leaves((('patch_embed.projection', 'patch_embed.proj'), ('patch_embed.norm',) * 2)),
    *with_leaves(_BLOCK, OURS, THEIRS),
)
OF_RELEASE = (
    *with_leaves([('norm{stage}', 'norm{stage}')]),
    Rule('absolute_pos_embed', 'absolute_pos_embed'),
)


def _rules(merge: str) -> tuple[Rule, ...]:
    """What release and timm share; ``merge`` is the number of the stage that has the merge."""
    return (
        *SHARED,
        Rule(f'{OURS}attn.w_msa.{TABLE_OF_BIAS}', f'{THEIRS}attn.{TABLE_OF_BIAS}'),
        *with_leaves(
            (('norm', 'norm'), ('reduction', 'reduction')),
            'stages.{stage}.downsample.',
            f'layers.{merge}.downsample.',
            from_release_order,
            to_release_order,
        ),
    )


_has_blocks = with_keys(
    'layers.0.blocks.0.attn.qkv.weight', f'layers.0.blocks.0.attn.{TABLE_OF_BIAS}'
)


def is_official(state: StateDict) -> bool:
    """Whether names are those of the Swin release."""
    return _has_blocks(state) and not is_timm(state)


def is_timm(state: StateDict) -> bool:
    """Whether names are those of timm's ``swin_*``."""
    merges = {key.split('.')[1] for key in state if '.downsample.' in key}
    return _has_blocks(state) and '1' in merges and '0' not in merges


def _with_indices(conversion: Conversion) -> Conversion:
    """Add the index that belongs to each table."""
    state: StateDict = {}
    for key, value in conversion.state.items():
        state[key] = value
        if key.endswith(TABLE_OF_BIAS):
            state |= index_of_table(key, window_of_table(value))
    return without_following(conversion._replace(state=state))


def without_following(conversion: Conversion) -> Conversion:
    """What follows from the window is no loss, and not worth telling."""
    dropped = [key for key in conversion.dropped if not key.endswith(FOLLOWING)]
    return conversion._replace(dropped=dropped)


# What stays of a classifier in files of mmseg 0.x and mmpretrain under OpenMMLab's names, masks
# that depend on the image size, and indices.
_LEFTOVERS = rf'^head\.|^norm\.|\.attn_mask$|{INDEX_OF_BIAS}$'
_names = partial(KeyMap, theirs_only=re.compile(_LEFTOVERS), decoded=_with_indices)
_OFFICIAL = _names(
    "the Swin release's",
    (*_rules('{stage}'), *OF_RELEASE),
    ours_only=re.compile(_LEFTOVERS),
    encoded=_with_indices,
)
# timm's Swin has neither norms of the outputs, which are dropped, nor an absolute position table.
_TIMM = _names(
    "timm's swin_*",
    _rules('{stage+1}'),
    ours_only=re.compile(rf'{_LEFTOVERS}|^norm\d+\.'),
    encoded=without_following,
)
_is_ours = with_keys(f'stages.0.blocks.0.attn.w_msa.{TABLE_OF_BIAS}')
FORMATS = (
    Format(
        'swin',
        OPENMMLAB,
        'mmdet and mmseg Swin',
        _is_ours,
        place='state_dict',
        prefixed_for='mmdet',
    ),
    Format('swin', 'timm', 'timm swin_*', is_timm, _TIMM),
    Format('swin', 'official', 'Swin release', is_official, _OFFICIAL, 'model'),
)
