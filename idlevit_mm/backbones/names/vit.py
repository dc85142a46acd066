"""Plain vision transformers: names of timm, DeiT, LV-ViT, IdleViT and mmpretrain.

timm (``vit_*``, ``deit_*``), the DeiT releases (https://github.com/facebookresearch/deit), those of
IdleViT on DeiT (https://github.com/Ackesnal/IdleViT) and mmseg's first version have the same names.
LV-ViT (https://github.com/zihangJiang/TokenLabeling) and IdleViT on LV-ViT have a stem of
convolutions besides. mmpretrain's names are mmseg's but for the attention.

Shape letters: N patches of the position table, C channels.
"""

import re

import torch

from ..checkpoints import StateDict
from .renaming import Conversion, KeyMap, Rule, with_leaves, with_qkv_biases

_CONV_STEM = 'patch_embed.conv1.weight'
# Classifiers and what only they need; mmseg's VisionTransformer has no place for them.
_CLASSIFIER = re.compile(r'^(head|head_dist|aux_head|fc_norm|pre_logits)\.|^dist_token$')
_OUTER = (
    Rule('cls_token', 'cls_token'),
    Rule('pos_embed', 'pos_embed'),
    *with_leaves((('patch_embed.norm',) * 2,), '', ''),
)
_TIMM_RULES = (
    *_OUTER,
    *with_leaves((('patch_embed.projection', 'patch_embed.proj'), ('ln1', 'norm')), '', ''),
    *with_leaves(
        (
            ('ln1', 'norm1'),
            ('attn.attn.out_proj', 'attn.proj'),
            ('ln2', 'norm2'),
            ('ffn.layers.0.0', 'mlp.fc1'),
            ('ffn.layers.1', 'mlp.fc2'),
        ),
        'layers.{block}.',
        'blocks.{block}.',
    ),
    Rule('layers.{block}.attn.attn.in_proj_{leaf}', 'blocks.{block}.attn.qkv.{leaf}'),
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
_TIMM = KeyMap("timm's vit_* and DeiT's", _TIMM_RULES, theirs_only=_CLASSIFIER)
_LVVIT = KeyMap("LV-ViT's", (*_TIMM_RULES, *_STEM_RULES), theirs_only=_CLASSIFIER)
_MMPRETRAIN = KeyMap(
    "mmpretrain's VisionTransformer",
    (
        *_OUTER,
        *with_leaves((('patch_embed.projection',) * 2, ('ln1',) * 2), '', ''),
        *with_leaves(
            (
                ('ln1',) * 2,
                ('attn.attn.out_proj', 'attn.proj'),
                ('ln2',) * 2,
                ('ffn.layers.0.0',) * 2,
                ('ffn.layers.1',) * 2,
            ),
            *(('layers.{block}.',) * 2),
        ),
        Rule('layers.{block}.attn.attn.in_proj_{leaf}', 'layers.{block}.attn.qkv.{leaf}'),
    ),
    theirs_only=re.compile(r'^head\.'),
)


def is_ours(state: StateDict) -> bool:
    """Whether names are those of mmseg's ``VisionTransformer``."""
    return 'layers.0.attn.attn.in_proj_weight' in state


def is_timm(state: StateDict) -> bool:
    """Whether names are those of timm's plain vision transformers or of the DeiT releases."""
    return _has_blocks(state) and _CONV_STEM not in state


def is_lvvit(state: StateDict) -> bool:
    """Whether names are those of the LV-ViT releases."""
    return _has_blocks(state) and _CONV_STEM in state


def is_mmpretrain(state: StateDict) -> bool:
    """Whether names are those of mmpretrain's ``VisionTransformer``."""
    return 'layers.0.attn.qkv.weight' in state and 'layers.0.ln1.weight' in state


def from_timm(state: StateDict) -> Conversion:
    """Names of timm's ``vit_*`` or ``deit_*`` models, or of a DeiT release, to mmseg's.

    Dropped are the classifiers with their norm (``head``, ``head_dist``, ``fc_norm``,
    ``pre_logits``) and, in distilled models, the distillation token: ``dist_token`` and its place,
    the second, in the position table, which shrinks from (1, 2 + N, C) to (1, 1 + N, C). Without
    that token the features of a distilled model change, as all tokens attended to it. Where query,
    key and value have no bias, theirs is 0: mmcv's attention has all of its biases or none.

    Raises:
        SettingError: A weight has no counterpart (layer scale, register tokens, ...).
    """
    return _decoded(_TIMM, state)


def to_timm(state: StateDict) -> Conversion:
    """Names of mmseg's ``VisionTransformer`` to timm's: the inverse of ``from_timm``.

    What was dropped there is not made up: load the result with ``strict=False`` where timm's model
    has a classifier.

    Raises:
        SettingError: A weight has no counterpart.
    """
    return _TIMM.encode(state)


def from_lvvit(state: StateDict) -> Conversion:
    """Names of an LV-ViT release, whose patches are embedded by a stem of convolutions.

    The classifiers (``head``, ``aux_head``) are dropped. Query, key and value of the releases have
    no bias; theirs is 0, as in ``from_timm``.

    Raises:
        SettingError: A weight has no counterpart.
    """
    return _decoded(_LVVIT, state)


def to_lvvit(state: StateDict) -> Conversion:
    """Names of ``IdleVisionTransformer(stem='conv')`` to the release's: inverse of ``from_lvvit``.

    Biases of query, key and value that are 0, as ``from_lvvit`` adds them, are dropped.

    Raises:
        SettingError: A weight has no counterpart.
    """
    converted, dropped, added = _LVVIT.encode(state)
    zero = [key for key, value in converted.items() if _is_zero_bias(key, value)]
    kept = {key: value for key, value in converted.items() if key not in zero}
    return Conversion(kept, dropped + zero, added)


def to_official(state: StateDict) -> Conversion:
    """Names of mmseg's ``VisionTransformer`` to those of the DeiT or LV-ViT releases.

    Raises:
        SettingError: A weight has no counterpart.
    """
    return to_lvvit(state) if 'patch_embed.stem.0.weight' in state else to_timm(state)


def from_mmpretrain(state: StateDict) -> Conversion:
    """Names of mmpretrain's ``VisionTransformer`` to mmseg's; the classifier is dropped.

    Raises:
        SettingError: A weight has no counterpart.
    """
    return _decoded(_MMPRETRAIN, state)


def to_mmpretrain(state: StateDict) -> Conversion:
    """Names of mmseg's ``VisionTransformer`` to mmpretrain's: the inverse of ``from_mmpretrain``.

    Raises:
        SettingError: A weight has no counterpart.
    """
    return _MMPRETRAIN.encode(state)


def _has_blocks(state: StateDict) -> bool:
    return 'patch_embed.proj.weight' in state and 'blocks.0.attn.qkv.weight' in state


def _is_zero_bias(key: str, value: torch.Tensor) -> bool:
    return key.endswith('.attn.qkv.bias') and not value.any()


def _decoded(names: KeyMap, state: StateDict) -> Conversion:
    if 'dist_token' in state and 'pos_embed' in state:
        table = state['pos_embed']
        state = {**state, 'pos_embed': torch.cat([table[:, :1], table[:, 2:]], dim=1)}
    return with_qkv_biases(names.decode(state))
