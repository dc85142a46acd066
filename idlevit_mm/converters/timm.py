"""State dicts of plain vision transformers in timm's naming, renamed for mmseg's modules.

timm: https://github.com/huggingface/pytorch-image-models; the DeiT releases
(https://github.com/facebookresearch/deit) have the same keys. LV-ViT, whose blocks are named alike:
https://github.com/zihangJiang/TokenLabeling.

Shape letters: N patches of the position table, C channels.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import SettingError

StateDict = dict[str, Tensor]

_BLOCK = re.compile(r'(blocks|layers)\.(\d+)\.(.+)')
_CONV_STEM = 'patch_embed.conv1.weight'
# Classifiers and what only they need; mmseg's VisionTransformer has no place for them.
_DROPPED = re.compile(r'(head|head_dist|aux_head|fc_norm|pre_logits)\.|dist_token$')


def _leaves(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Spell out weight and bias of pairs (timm's name, mmseg's name)."""
    return {f'{a}{leaf}': f'{b}{leaf}' for a, b in pairs for leaf in ('weight', 'bias')}


_BLOCK_KEYS = _leaves(
    (
        ('norm1.', 'ln1.'),
        ('attn.qkv.', 'attn.attn.in_proj_'),
        ('attn.proj.', 'attn.attn.out_proj.'),
        ('norm2.', 'ln2.'),
        ('mlp.fc1.', 'ffn.layers.0.0.'),
        ('mlp.fc2.', 'ffn.layers.1.'),
    )
)
_VIT_KEYS = {
    'cls_token': 'cls_token',
    'pos_embed': 'pos_embed',
    **_leaves((('patch_embed.proj.', 'patch_embed.projection.'), ('norm.', 'ln1.'))),
}
# Convolution, norm and activation follow each other in `patch_embed.stem`; only two have weights.
_STEM_KEYS = {
    f'patch_embed.{part}{i + 1}.{leaf}': f'patch_embed.stem.{3 * i + offset}.{leaf}'
    for i in range(3)
    for offset, part, leaves in (
        (0, 'conv', ('weight',)),
        (1, 'bn', ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')),
    )
    for leaf in leaves
}


def is_timm_vit(state: StateDict) -> bool:
    """Whether keys are those of timm's plain vision transformers or of the DeiT releases."""
    return _has_timm_blocks(state) and _CONV_STEM not in state


def is_lvvit(state: StateDict) -> bool:
    """Whether keys are those of the LV-ViT releases."""
    return _has_timm_blocks(state) and _CONV_STEM in state


def vit_from_timm(state: StateDict) -> StateDict:
    """Rename a state dict of timm's ``vit_*`` or ``deit_*`` models, or of a DeiT release.

    Dropped are the classifiers with their norm (``head``, ``head_dist``, ``fc_norm``,
    ``pre_logits``) and, in distilled models, the distillation token: ``dist_token`` and its place,
    the second, in the position table, which shrinks from (1, 2 + N, C) to (1, 1 + N, C). Without
    that token the features of a distilled model change, as all tokens attended to it. Where query,
    key and value have no bias, theirs is 0: mmcv's attention has all of its biases or none.

    Args:
        state: Parameters by timm's names, as they lie under 'model' in a DeiT release.

    Raises:
        SettingError: The model has weights without a counterpart (layer scale, register tokens,
            ...).
    """
    return _from_timm(state, _VIT_KEYS)


def vit_to_timm(state: StateDict) -> StateDict:
    """Rename mmseg's ``VisionTransformer`` for timm: the inverse of ``vit_from_timm``.

    What was dropped there is not made up: load the result with ``strict=False`` where timm's model
    has a classifier.

    Args:
        state: Parameters by mmseg's names.

    Raises:
        SettingError: The model has weights without a counterpart in timm.
    """
    return _renamed(state, 'blocks', _inverse(_VIT_KEYS), _inverse(_BLOCK_KEYS))


def lvvit_from_official(state: StateDict) -> StateDict:
    """Rename an LV-ViT release, whose patches are embedded by a stem of convolutions.

    The classifiers (``head``, ``aux_head``) are dropped. Query, key and value of the releases have
    no bias; theirs is 0, as in ``vit_from_timm``.

    Args:
        state: Parameters by the names of the release.

    Raises:
        SettingError: The model has weights without a counterpart.
    """
    return _from_timm(state, _VIT_KEYS | _STEM_KEYS)


def _has_timm_blocks(state: StateDict) -> bool:
    return 'patch_embed.proj.weight' in state and 'blocks.0.attn.qkv.weight' in state


def _inverse(keys: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in keys.items()}


def _from_timm(state: StateDict, outer_keys: dict[str, str]) -> StateDict:
    kept = {key: value for key, value in state.items() if not _DROPPED.match(key)}
    if 'dist_token' in state:
        table = kept['pos_embed']
        kept['pos_embed'] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    return _with_qkv_biases(_renamed(kept, 'layers', outer_keys, _BLOCK_KEYS))


def _renamed(
    state: StateDict, blocks: str, outer_keys: dict[str, str], block_keys: dict[str, str]
) -> StateDict:
    """Rename every key; ``blocks`` is the new name of the list of blocks."""
    renamed, unknown = {}, []
    for key, value in state.items():
        match = _BLOCK.fullmatch(key)
        if match and match[3] in block_keys:
            renamed[f'{blocks}.{match[2]}.{block_keys[match[3]]}'] = value
        elif key in outer_keys:
            renamed[outer_keys[key]] = value
        else:
            unknown.append(key)
    if unknown:
        raise SettingError(
            f'state has {len(unknown)} weights that a plain vision transformer has not: '
            f'{", ".join(unknown[:3])}; allowed in blocks: {", ".join(block_keys)}; '
            f'outside: {", ".join(outer_keys)}'
        )
    return renamed


def _with_qkv_biases(state: StateDict) -> StateDict:
    """Add zero biases of query, key and value where the output has one and they have none."""
    complete = {}
    for key, value in state.items():
        complete[key] = value
        bias = key.removesuffix('weight') + 'bias'
        output_bias = bias.replace('in_proj_', 'out_proj.')
        if key.endswith('.in_proj_weight') and bias not in state and output_bias in state:
            complete[bias] = value.new_zeros(value.shape[0])
    return complete
