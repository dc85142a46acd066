"""State dicts of official Swin, PVT and SegFormer releases, renamed as mmdet's and mmseg's modules.

Swin: https://github.com/microsoft/Swin-Transformer. PVT: https://github.com/whai362/PVT.
SegFormer, whose backbone has the names of PVTv2: https://github.com/NVlabs/SegFormer.
"""

import re

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

_SWIN_RENAMES = (
    (r'^layers\.', 'stages.'),
    (r'\.attn\.', '.attn.w_msa.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
)
# Classifier, its norm and masks that depend on the image size have no place in a backbone.
_SWIN_DROPPED = re.compile(r'^head\.|^norm\.|\.attn_mask$')
_PVT_DROPPED = re.compile(r'^head|^norm\.|^cls_token')
_PVT_BLOCK = re.compile(r'^block(\d+)\.(\d+)\.(.+)$')
_PVT_STAGE = re.compile(r'^(patch_embed|norm|pos_embed)(\d+)(.*)$')


def is_official_swin(state: StateDict) -> bool:
    """Whether keys are those of the official Swin release."""
    return any(key.startswith('layers.') for key in state)


def is_official_pvt(state: StateDict) -> bool:
    """Whether keys are those of the official PVT and SegFormer releases."""
    return any(_PVT_BLOCK.match(key) for key in state)


def swin_from_official(state: StateDict) -> StateDict:
    """Rename an official Swin state dict and reorder its patch merging.

    The release concatenates the four patches of a merge as (top left, bottom left, top right,
    bottom right) with channels fastest; mmcv's ``PatchMerging`` unfolds row by row with channels
    slowest.
    """
    converted = {}
    for key, value in state.items():
        if _SWIN_DROPPED.search(key):
            continue
        if '.downsample.' in key:
            value = _unfold_order(value)
        for pattern, replacement in _SWIN_RENAMES:
            key = re.sub(pattern, replacement, key)
        converted[key] = value
    return converted


def pvt_from_official(state: StateDict) -> StateDict:
    """Rename an official PVT, PVTv2 or MiT state dict, joining query and key-value projections."""
    converted = {}
    has_position = any(key.startswith('pos_embed') for key in state)
    has_conv = any('.dwconv.' in key for key in state)
    for key, value in state.items():
        if _PVT_DROPPED.match(key) or '.attn.kv.' in key:
            continue
        if match := _PVT_BLOCK.match(key):
            stage, block, rest = int(match[1]) - 1, int(match[2]) + has_position, match[3]
            if rest.startswith('attn.q.'):
                value = torch.cat([value, state[key.replace('.q.', '.kv.')]])
            elif re.fullmatch(r'mlp\.fc[12]\.weight', rest):
                value = value[:, :, None, None]
            key = f'layers.{stage}.1.{block}.{_pvt_block_key(rest, has_conv)}'
        elif match := _PVT_STAGE.match(key):
            stage, rest = int(match[2]) - 1, match[3]
            if match[1] == 'pos_embed':
                key = f'layers.{stage}.1.0.pos_embed'
                value = _without_class_token(value, stage == 3 and 'cls_token' in state)
            elif match[1] == 'norm':
                key = f'layers.{stage}.2{rest}'
            else:
                key = f'layers.{stage}.0{rest}'.replace('.proj.', '.projection.')
        converted[key] = value
    return converted


def _unfold_order(value: Tensor) -> Tensor:
    """Reorder the last dimension of a merge's norm (4C,) or reduction (2C, 4C)."""
    patches = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return patches.transpose(-1, -2).flatten(-2)


def _pvt_block_key(key: str, has_conv: bool) -> str:
    renames = {
        r'^attn\.q\.': 'attn.attn.in_proj_',
        r'^attn\.proj\.': 'attn.attn.out_proj.',
        r'^mlp\.fc1\.': 'ffn.layers.0.',
        r'^mlp\.dwconv\.dwconv\.': 'ffn.layers.1.',
        r'^mlp\.fc2\.': 'ffn.layers.4.' if has_conv else 'ffn.layers.3.',
    }
    for pattern, replacement in renames.items():
        key = re.sub(pattern, replacement, key)
    return key


def _without_class_token(table: Tensor, has_class_token: bool) -> Tensor:
    """Drop the class token's row, the first, which only the last table of PVT has."""
    # Releases without the class token itself keep its row in the table of 7 x 7 places.
    return table[:, 1:] if has_class_token or table.shape[1] == 50 else table
