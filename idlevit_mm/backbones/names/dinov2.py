"""DINOv2: names of the release and of Hugging Face's models.

The release (https://github.com/facebookresearch/dinov2) has timm's names and a mask token besides.
With registers both have a place for the class token in the position table, which timm and we add
to the class token. Mask tokens are dropped, and written as 0 on the way back.
"""

import re
from functools import partial

import torch

from ...converters.formats import Format, with_keys
from ...converters.renaming import Conversion, Joint, KeyMap, Rule, with_leaves, with_qkv_biases
from .vit import SCALE_RULES, TIMM_RULES, is_dinov2

# Queries, keys and values of each block; ``qkv`` is our word for all of them.
_QKV = Joint(
    '{path}.qkv.{leaf}',
    ('{path}.query.{leaf}', '{path}.key.{leaf}', '{path}.value.{leaf}'),
    (1, 1, 1),
)
_BLOCK = (
    ('ln1', 'norm1'),
    ('attn.attn.out_proj', 'attention.output.dense'),
    ('ln2', 'norm2'),
    ('ffn.layers.0.0', 'mlp.fc1'),
    ('ffn.layers.1', 'mlp.fc2'),
)


def _decoded(conversion: Conversion) -> Conversion:
    """Beside registers the class token takes what the table has in its place."""
    state = conversion.state
    if {'register_tokens', 'cls_token', 'pos_embed'} <= state.keys():
        table = state['pos_embed']
        first = state['cls_token'] + table[:, :1]
        state = {**state, 'cls_token': first, 'pos_embed': table[:, 1:]}
    return with_qkv_biases(conversion._replace(state=state))


def _completed(conversion: Conversion, prefix: str, table: str) -> Conversion:
    """Add a mask token, and beside registers the class token's place in the table: both 0."""
    state, added = dict(conversion.state), list(conversion.added)
    places = state[f'{prefix}{table}']
    state[f'{prefix}mask_token'] = places.new_zeros(1, places.shape[-1])
    added.append(f'{prefix}mask_token')
    if f'{prefix}register_tokens' in state:
        first = torch.zeros_like(places[:, :1])
        state[f'{prefix}{table}'] = torch.cat([first, places], dim=1)
        added.append(f'{prefix}{table}[:, 0]')
    return conversion._replace(state=state, added=added)


def _parted(conversion: Conversion) -> Conversion:
    """Queries, keys and values apart, and what else they have."""
    return _completed(_QKV.parted(conversion), 'embeddings.', 'position_embeddings')


_names = partial(
    KeyMap,
    theirs_only=re.compile(r'^(embeddings\.)?mask_token$|^head\.'),
    decoded=_decoded,
)
_DINOV2 = _names(
    "the DINOv2 release's",
    (*TIMM_RULES, *SCALE_RULES, Rule('register_tokens', 'register_tokens')),
    encoded=partial(_completed, prefix='', table='pos_embed'),
)
_HUGGING_FACE = _names(
    "Hugging Face's Dinov2Model",
    (
        Rule('cls_token', 'embeddings.cls_token'),
        Rule('register_tokens', 'embeddings.register_tokens'),
        Rule('pos_embed', 'embeddings.position_embeddings'),
        *with_leaves(
            (
                ('patch_embed.projection', 'embeddings.patch_embeddings.projection'),
                ('ln1', 'layernorm'),
            )
        ),
        *with_leaves(_BLOCK, 'layers.{block}.', 'encoder.layer.{block}.'),
        *(
            Rule(f'layers.{{block}}.{ours}', f'encoder.layer.{{block}}.{theirs}')
            for ours, theirs in (
                ('attn.attn.in_proj_{leaf}', 'attention.attention.qkv.{leaf}'),
                ('attn.gamma1.weight', 'layer_scale1.lambda1'),
                ('ffn.gamma2.weight', 'layer_scale2.lambda1'),
            )
        ),
    ),
    before=_QKV.joined,
    encoded=_parted,
)
_is_hugging_face = with_keys('embeddings.position_embeddings', 'encoder.layer.0.norm1.weight')
FORMATS = (
    Format('vit', 'dinov2', 'DINOv2 release', is_dinov2, _DINOV2),
    Format('vit', 'huggingface', 'Hugging Face Dinov2Model', _is_hugging_face, _HUGGING_FACE),
)
