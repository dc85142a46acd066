"""PVT, PVTv2 and the Mix Transformer of SegFormer: names of the releases and of timm.

Releases: https://github.com/whai362/PVT (both versions) and https://github.com/NVlabs/SegFormer,
whose backbone has the names of PVTv2. timm has ``pvt_v2_*`` alone.
"""

import re
from functools import partial

import torch

from ...checkpoints import StateDict
from ...converters.formats import OPENMMLAB, Format, Names, with_keys
from ...converters.renaming import Conversion, Joint, KeyMap, Rule, with_leaves, with_qkv_biases
from ...errors import SettingError

# Query (C, C) and key-value (2C, C) projections.
QUERY_KEY_VALUE = Joint(
    '{path}.attn.q_kv.{leaf}', ('{path}.attn.q.{leaf}', '{path}.attn.kv.{leaf}'), shares=(1, 2)
)
# The position table of PVT that has a row for the class token, and its places then.
_CLASS_TABLE = 'pos_embed4'
_CLASS_PLACES = 50


def _block_rules(ours: str, theirs: str, conv: str) -> tuple[Rule, ...]:
    """Rules of a block; ``conv`` is what they call the depth-wise convolution, '' without one."""
    same_kind = [
        ('norm1', 'norm1'),
        ('attn.attn.out_proj', 'attn.proj'),
        ('attn.sr', 'attn.sr'),
        ('attn.norm', 'attn.norm'),
        ('norm2', 'norm2'),
    ]
    if conv:
        same_kind.append(('ffn.layers.1', conv))
    linear = (('ffn.layers.0', 'mlp.fc1'), ('ffn.layers.4' if conv else 'ffn.layers.3', 'mlp.fc2'))
    # Weights (out, in) of linear layers are those of 1x1 convolutions here.
    shapes = (lambda x: x[:, :, None, None], lambda x: x[:, :, 0, 0])
    return (
        *with_leaves(same_kind, ours, theirs),
        Rule(f'{ours}attn.attn.in_proj_{{leaf}}', f'{theirs}attn.q_kv.{{leaf}}'),
        *(Rule(f'{ours}{a}.weight', f'{theirs}{b}.weight', *shapes) for a, b in linear),
        *(Rule(f'{ours}{a}.bias', f'{theirs}{b}.bias') for a, b in linear),
    )


def joined(state: StateDict) -> StateDict:
    """Join projections to one (3C, C); a SettingError tells of one without the other."""
    queries = {key for key in state if '.attn.q.' in key}
    others = {key.replace('.attn.kv.', '.attn.q.') for key in state if '.attn.kv.' in key}
    if alone := sorted(queries ^ others):
        raise SettingError(
            f'{len(alone)} weights of query or key-value are without the other, such as {alone[0]}'
        )
    return QUERY_KEY_VALUE.joined(state)


_names = partial(
    KeyMap,
    theirs_only=re.compile(r'^head\.|^norm\.|^cls_token$'),  # the classifier
    before=joined,
    decoded=with_qkv_biases,
    encoded=QUERY_KEY_VALUE.parted,
)


def _official(has_position: bool, has_conv: bool) -> KeyMap:
    # A position table is the first of a stage's blocks in OpenMMLab.
    ours = f'layers.{{stage}}.1.{"{block+1}" if has_position else "{block}"}.'
    return _names(
        "the PVT and SegFormer releases'",
        (
            *with_leaves(
                (
                    ('layers.{stage}.0.projection', 'patch_embed{stage+1}.proj'),
                    ('layers.{stage}.0.norm', 'patch_embed{stage+1}.norm'),
                    ('layers.{stage}.2', 'norm{stage+1}'),
                )
            ),
            Rule('layers.{stage}.1.0.pos_embed', 'pos_embed{stage+1}'),
            *_block_rules(ours, 'block{stage+1}.{block}.', 'mlp.dwconv.dwconv' if has_conv else ''),
        ),
    )


# timm has no PVT of the first version.
_TIMM = _names(
    "timm's pvt_v2_*",
    (
        *with_leaves(
            (
                ('layers.0.0.projection', 'patch_embed.proj'),
                ('layers.0.0.norm', 'patch_embed.norm'),
                ('layers.{stage}.0.projection', 'stages.{stage}.downsample.proj'),
                ('layers.{stage}.0.norm', 'stages.{stage}.downsample.norm'),
                ('layers.{stage}.2', 'stages.{stage}.norm'),
            )
        ),
        *_block_rules('layers.{stage}.1.{block}.', 'stages.{stage}.blocks.{block}.', 'mlp.dwconv'),
    ),
)


def is_ours(state: StateDict) -> bool:
    """Whether names are those of mmdet's PVT and PVTv2 and of mmseg's Mix Transformer."""
    return any(f'layers.0.1.{block}.attn.attn.in_proj_weight' in state for block in (0, 1))


def from_official(state: StateDict) -> Conversion:
    """Names of the releases to OpenMMLab's, query and key-value projections joined.

    Dropped are the classifier, its norm, and PVT's class token with its row of the last position
    table, which releases without class token have as well. Errors are those of ``KeyMap.decode``.
    """
    names = _official('pos_embed1' in state, any('.dwconv.' in key for key in state))
    table = state.get(_CLASS_TABLE)
    if table is not None and ('cls_token' in state or table.shape[1] == _CLASS_PLACES):
        state = {**state, _CLASS_TABLE: table[:, 1:]}
    return names.decode(state)


def to_official(state: StateDict) -> Conversion:
    """OpenMMLab's names to those of the releases: the inverse of ``from_official``.

    Where PVT has a last position table, it gets the row of the class token back, and a class token;
    both are 0, and no feature map depends on them. Errors are those of ``KeyMap.encode``.
    """
    has_conv = any('.ffn.layers.4.' in key for key in state)
    names = _official('layers.0.1.0.pos_embed' in state, has_conv)
    converted, dropped, _ = names.encode(state)
    if _CLASS_TABLE not in converted:
        return Conversion(converted, dropped, [])
    table = converted[_CLASS_TABLE]
    first = torch.zeros_like(table[:, :1])
    converted |= {'cls_token': first, _CLASS_TABLE: torch.cat([first, table], dim=1)}
    return Conversion(converted, dropped, ['cls_token', f'{_CLASS_TABLE}[:, 0]'])


_OFFICIAL = Names(from_official, to_official)
_is_timm = with_keys('stages.0.blocks.0.attn.q.weight')
_is_official = with_keys('block1.0.attn.q.weight')
FORMATS = (
    Format('pvt', OPENMMLAB, 'mmdet and mmseg PVT and MiT', is_ours, place='state_dict'),
    Format('pvt', 'timm', 'timm pvt_v2_*', _is_timm, _TIMM),
    Format('pvt', 'official', 'PVT or SegFormer release', _is_official, _OFFICIAL),
)
