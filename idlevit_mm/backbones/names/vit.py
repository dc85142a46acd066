"""Plain vision transformers: names of timm, DeiT, LV-ViT, IdleViT, Evo-ViT and mmpretrain.

timm (``vit_*``, ``deit_*``), the DeiT releases (https://github.com/facebookresearch/deit), those of
IdleViT on DeiT (https://github.com/Ackesnal/IdleViT) and mmseg's first version have the same names.
LV-ViT (https://github.com/zihangJiang/TokenLabeling) and IdleViT on LV-ViT have a stem of
convolutions besides. mmpretrain's names are mmseg's but for the attention. Evo-ViT on DeiT
(https://github.com/YifanXu74/Evo-ViT) has lists of layers, and values apart from queries and keys.

A distilled model loses its distillation token and the token's place, the second, in the position
table, which shrinks from (1, 2 + N, C) to (1, 1 + N, C) for N patches and C channels; its features
change, as all tokens attended to that one. Classifiers are dropped and not made up on the way back:
load the result with ``strict=False`` where timm's model has one.
"""

import re
from functools import partial

import torch

from ...checkpoints import StateDict
from ...converters.formats import OPENMMLAB, Format, Names, with_keys
from ...converters.renaming import Conversion, Joint, KeyMap, Rule, with_leaves, with_qkv_biases

_OURS = 'layers.{block}.'
# Parts of a block here, in timm, in mmpretrain and in Evo-ViT, which has lists of layers.
_BLOCK = (
    ('ln1', 'norm1', 'ln1', 'norms.{block}'),
    ('attn.attn.out_proj', 'attn.proj', 'attn.proj', 'projs.{block}'),
    ('ln2', 'norm2', 'ln2', 'blocks.{block}.norm2'),
    ('ffn.layers.0.0', 'mlp.fc1', 'ffn.layers.0.0', 'blocks.{block}.mlp.fc1'),
    ('ffn.layers.1', 'mlp.fc2', 'ffn.layers.1', 'blocks.{block}.mlp.fc2'),
)


def _rules(
    column: int, projection: str, norm: str, block: str, qkv: str = 'attn.qkv'
) -> tuple[Rule, ...]:
    """What all have: by their column of ``_BLOCK``, and names of what is not in it."""
    outer = (('patch_embed.projection', f'patch_embed.{projection}'), ('ln1', norm))
    return (
        Rule('cls_token', 'cls_token'),
        Rule('pos_embed', 'pos_embed'),
        *with_leaves((('patch_embed.norm', 'patch_embed.norm'), *outer)),
        *with_leaves(((names[0], names[column]) for names in _BLOCK), _OURS, block),
        Rule(f'{_OURS}attn.attn.in_proj_{{leaf}}', f'{block}{qkv}.{{leaf}}'),
    )


TIMM_RULES = _rules(1, 'proj', 'norm', 'blocks.{block}.')
# Factors of the channels of both branches.
SCALE_RULES = (
    Rule('layers.{block}.attn.gamma1.weight', 'blocks.{block}.ls1.gamma'),
    Rule('layers.{block}.ffn.gamma2.weight', 'blocks.{block}.ls2.gamma'),
)
# Convolution, norm and activation follow each other in `patch_embed.stem`; only two have weights.
_STEM_RULES = with_leaves(
    (
        pair
        for i in range(3)
        for pair in ((f'stem.{3 * i}', f'conv{i + 1}'), (f'stem.{3 * i + 1}', f'bn{i + 1}'))
    ),
    'patch_embed.',
    'patch_embed.',
)


def _without_distillation(state: StateDict) -> StateDict:
    """Take the place of the distillation token, the second, out of the position table."""
    if 'dist_token' not in state or 'pos_embed' not in state:
        return state
    table = state['pos_embed']
    return {**state, 'pos_embed': torch.cat([table[:, :1], table[:, 2:]], dim=1)}


def _without_zero_biases(conversion: Conversion) -> Conversion:
    """Drop biases of query, key and value that are 0, as reading a release adds them."""
    zero = [k for k, v in conversion.state.items() if k.endswith('.attn.qkv.bias') and not v.any()]
    kept = {key: value for key, value in conversion.state.items() if key not in zero}
    return conversion._replace(state=kept, dropped=conversion.dropped + zero)


# Classifiers and what only they need; mmseg's VisionTransformer has no place for them.
_names = partial(
    KeyMap,
    theirs_only=re.compile(r'^(head|head_dist|aux_head|fc_norm|pre_logits)\.|^dist_token$'),
    before=_without_distillation,
    decoded=with_qkv_biases,
)
_TIMM = _names(
    "timm's vit_* and DeiT's",
    (*TIMM_RULES, *SCALE_RULES, Rule('register_tokens', 'reg_token')),
)
_DEIT = _names("DeiT's", TIMM_RULES)
_LVVIT = _names("LV-ViT's", (*TIMM_RULES, *_STEM_RULES), encoded=_without_zero_biases)


# Queries and keys of each block, and its values; ``qkvs`` is our word for all of them.
_EVO_QKV = Joint(
    'qkvs.{block}.{leaf}', ('qks.{block}.qk.{leaf}', 'vs.{block}.v.{leaf}'), shares=(2, 1)
)
_EVO = KeyMap(
    "Evo-ViT's",
    _rules(3, 'proj', 'norm', block='', qkv='qkvs.{block}'),
    theirs_only=re.compile(r'^(head|head_cls|norm_cls|pre_logits)\.'),
    before=_EVO_QKV.joined,
    encoded=_EVO_QKV.parted,
)
_MMPRETRAIN = _names(
    "mmpretrain's VisionTransformer",
    (
        *_rules(2, 'projection', 'ln1', _OURS),
        *with_leaves(((name, name) for name in ('attn.gamma1', 'ffn.gamma2')), _OURS, _OURS),
    ),
    theirs_only=re.compile(r'^head\.'),
)
_has_blocks = with_keys('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight')
_has_stem = with_keys('patch_embed.conv1.weight')
_is_evo = with_keys('qks.0.qk.weight', 'vs.0.v.weight')
_is_mmpretrain = with_keys('layers.0.attn.qkv.weight', 'layers.0.ln1.weight')


def is_dinov2(state: StateDict) -> bool:
    """Whether names are those of the DINOv2 releases, which have some that timm has not."""
    return _has_blocks(state) and ('mask_token' in state or 'register_tokens' in state)


def has_windows(state: StateDict) -> bool:
    """Whether weights are those of ViTDet, whose names are those of others: by its tables."""
    table = state.get('pos_embed')
    return any('.0.attn.rel_pos_h' in key for key in state) or (
        table is not None and table.dim() == 4
    )


def _is_plain(state: StateDict) -> bool:
    return _is_mmpretrain(state) and not has_windows(state)


def is_vitdet(state: StateDict) -> bool:
    """Whether names are those of mmpretrain's ViTSAM."""
    return _is_mmpretrain(state) and has_windows(state)


def is_timm(state: StateDict) -> bool:
    """Whether names are those of timm's plain vision transformers or of the DeiT releases."""
    others = _has_stem(state) or is_dinov2(state) or has_windows(state)
    return _has_blocks(state) and not others


def is_lvvit(state: StateDict) -> bool:
    """Whether names are those of the LV-ViT releases."""
    return _has_blocks(state) and _has_stem(state)


def to_official(state: StateDict) -> Conversion:
    """Names of mmseg's class to those of the DeiT or LV-ViT releases; see ``KeyMap.encode``."""
    return (_LVVIT if 'patch_embed.stem.0.weight' in state else _DEIT).encode(state)


_OFFICIAL = Names(_LVVIT.decode, to_official)
_is_ours = with_keys('layers.0.attn.attn.in_proj_weight')
FORMATS = (
    Format('vit', OPENMMLAB, 'mmseg ViT', _is_ours, place='state_dict'),
    Format('vit', 'timm', 'timm vit_*, deit_* or DeiT', is_timm, _TIMM),
    Format('vit', 'official', 'LV-ViT release', is_lvvit, _OFFICIAL, 'model'),
    Format('vit', 'evovit', 'Evo-ViT release', _is_evo, _EVO, 'model'),
    Format('vit', 'mmpretrain', 'mmpretrain ViT', _is_plain, _MMPRETRAIN, 'state_dict'),
)
