"""ViTDet and the encoder of SAM: names of mmdet's project, detectron2, MAE, timm and SAM.

OpenMMLab's are those of mmpretrain's ViTSAM, whose absolute position table is (1, H, W, C) for maps
of H * W patches and C channels. mmdet's project ``ViTDet``, detectron2 and MAE's pre-training
(https://github.com/facebookresearch/mae) have one of (1, 1 + H * W, C), whose place of the class
token is dropped, and written as 0 on the way back. MAE's files have no relative tables, which stay
as they are. timm (``samvit_*``) and SAM (https://github.com/facebookresearch/segment-anything) have
a reduction of channels behind the blocks, which a detector has not.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch

from ...checkpoints import StateDict
from ...converters.formats import OPENMMLAB, Format, with_keys
from ...converters.renaming import Conversion, KeyMap, Rule, with_leaves
from ...errors import SettingError
from .vit import is_vitdet

_OURS = 'layers.{block}.'
_THEIRS = 'blocks.{block}.'
# Before the names of a backbone in files of whole models.
_PREFIXES = ('image_encoder.', 'net.')


def _rules(first: str, second: str) -> tuple[Rule, ...]:
    """What all have, by the names of the two layers of the feed-forward network."""
    parts = (
        ('ln1', 'norm1'),
        ('attn.qkv', 'attn.qkv'),
        ('attn.proj', 'attn.proj'),
        ('ln2', 'norm2'),
        ('ffn.layers.0.0', first),
        ('ffn.layers.1', second),
    )
    return (
        Rule('pos_embed', 'pos_embed'),
        *with_leaves([('patch_embed.projection', 'patch_embed.proj')]),
        *with_leaves(parts, _OURS, _THEIRS),
        *(
            Rule(f'{_OURS}attn.{name}', f'{_THEIRS}attn.{name}')
            for name in ('rel_pos_h', 'rel_pos_w')
        ),
        *with_leaves((f'channel_reduction.{i}', f'neck.{i}') for i in range(4)),
    )


def _bare(state: StateDict) -> StateDict:
    """Weights of the backbone alone, where those of a whole model are given."""
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in state):
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return state


def _as_map(conversion: Conversion) -> Conversion:
    """Position table of a square image, without the place of a class token: (1, H, W, C)."""
    table = conversion.state.get('pos_embed')
    if table is None or table.dim() != 3:
        return conversion
    side = math.isqrt(table.shape[1])
    first = table.shape[1] - side * side
    if first > 1:
        raise SettingError(
            f'pos_embed has {table.shape[1]} places; allowed: a square number, or one more'
        )
    table = table[:, first:].unflatten(1, (side, side))
    return conversion._replace(state={**conversion.state, 'pos_embed': table})


def _as_row(conversion: Conversion) -> Conversion:
    """The inverse, with a place of 0."""
    if 'pos_embed' not in conversion.state:
        return conversion
    table = conversion.state['pos_embed'].flatten(1, 2)
    table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    return Conversion(
        {**conversion.state, 'pos_embed': table},
        conversion.dropped,
        [*conversion.added, 'pos_embed[:, 0]'],
    )


_names = partial(KeyMap, before=_bare)
_DETECTRON2 = _names(
    "ViTDet's of mmdet and detectron2, or MAE's",
    _rules('mlp.fc1', 'mlp.fc2'),
    theirs_only=re.compile(r'^(cls_token|mask_token|norm\.|head\.|decoder|fc_norm\.)'),
    ours_only=re.compile(r'^channel_reduction\.'),
    decoded=_as_map,
    encoded=_as_row,
)
_TIMM = _names("timm's samvit_*", _rules('mlp.fc1', 'mlp.fc2'), theirs_only=re.compile(r'^head\.'))
_SAM = _names("SAM's", _rules('mlp.lin1', 'mlp.lin2'))


def _has_map(state: StateDict) -> bool:
    return 'pos_embed' in state and state['pos_embed'].dim() == 4


def _matches(*keys: str, has_map: bool | None = None) -> Callable[[StateDict], bool]:
    has_keys = with_keys('blocks.0.attn.qkv.weight', *keys)

    def matches(state: StateDict) -> bool:
        state = _bare(state)
        return has_keys(state) and has_map in (None, _has_map(state))

    return matches


_is_timm = _matches('blocks.0.mlp.fc1.weight', has_map=True)
FORMATS = (
    Format('vitdet', OPENMMLAB, 'mmpretrain ViTSAM', is_vitdet, place='state_dict'),
    Format(
        'vitdet',
        'detectron2',
        'detectron2 or mmdet ViTDet, or MAE',
        _matches('blocks.0.mlp.fc1.weight', has_map=False),
        _DETECTRON2,
        'model',
    ),
    Format('vitdet', 'timm', 'timm samvit_*', _is_timm, _TIMM),
    Format('vitdet', 'official', 'SAM release', _matches('blocks.0.mlp.lin1.weight'), _SAM),
)
