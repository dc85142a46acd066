"""Swin Transformer V2: names of the release and of timm.

The release (https://github.com/microsoft/Swin-Transformer) ends a stage with its patch merging;
timm (``swinv2_*``) begins the next one with it, as mmpretrain does. Both differ from Swin in the
attention and in the norms of merges. Window sizes are in no weight: any window takes them.
"""

import re
from functools import partial

from ...checkpoints import FOLLOWING, StateDict
from ...converters.formats import OPENMMLAB, Format, with_keys
from ...converters.renaming import KeyMap, Rule, with_leaves
from .swin import (
    OF_RELEASE,
    OURS,
    SHARED,
    THEIRS,
    from_release_order,
    to_release_order,
    without_following,
)

_ATTENTION = ('logit_scale', 'q_bias', 'v_bias', 'cpb_mlp.0.{leaf}', 'cpb_mlp.2.weight')


def _rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """What release and timm share; a merge has these two numbers of a stage."""
    ours, theirs = f'stages.{ours}.downsample.', f'layers.{theirs}.downsample.'
    return (
        *SHARED,
        *(Rule(f'{OURS}attn.w_msa.{name}', f'{THEIRS}attn.{name}') for name in _ATTENTION),
        *with_leaves(
            [('reduction', 'reduction')], ours, theirs, from_release_order, to_release_order
        ),
        *with_leaves([('norm', 'norm')], ours, theirs),
    )


_has_blocks = with_keys('layers.0.blocks.0.attn.logit_scale', 'layers.0.blocks.0.attn.q_bias')


def is_official(state: StateDict) -> bool:
    """Whether names are those of the Swin V2 release, whose first stage has a merge."""
    return _has_blocks(state) and 'layers.0.downsample.reduction.weight' in state


def is_timm(state: StateDict) -> bool:
    """Whether names are those of timm's ``swinv2_*``."""
    return _has_blocks(state) and not is_official(state)


# Classifiers, masks that depend on the image size, and what follows from the window.
_LEFTOVERS = '|'.join([r'^head\.|^norm\.|\.attn_mask$', *(f'{name}$' for name in FOLLOWING)])
_names = partial(
    KeyMap,
    theirs_only=re.compile(_LEFTOVERS),
    decoded=without_following,
    encoded=without_following,
)
_OFFICIAL = _names(
    "the Swin V2 release's",
    (*_rules('{stage+1}', '{stage}'), *OF_RELEASE),
    ours_only=re.compile(_LEFTOVERS),
)
# timm's Swin V2 has neither norms of the outputs, which are dropped, nor a position table.
_TIMM = _names(
    "timm's swinv2_*",
    _rules('{stage}', '{stage}'),
    ours_only=re.compile(rf'{_LEFTOVERS}|^norm\d+\.'),
)
_is_ours = with_keys('stages.0.blocks.0.attn.w_msa.logit_scale')
FORMATS = (
    Format('swinv2', OPENMMLAB, 'mmpretrain Swin V2', _is_ours, place='state_dict'),
    Format('swinv2', 'timm', 'timm swinv2_*', is_timm, _TIMM),
    Format('swinv2', 'official', 'Swin V2 release', is_official, _OFFICIAL, 'model'),
)
