"""Twins-PCPVT and Twins-SVT: names of the release and of timm.

The release (https://github.com/Meituan-AutoML/Twins) and timm (``twins_*``) have the same names,
but that detectors and segmentors of the release have norms of the outputs besides. Attention to the
reduced map and attention in windows have the same names there; their projections tell them apart.
"""

import re
from functools import partial

from ...checkpoints import StateDict
from ...converters.formats import OPENMMLAB, Format, with_keys
from ...converters.renaming import Conversion, KeyMap, Rule, with_leaves, with_qkv_biases
from .pvt import QUERY_KEY_VALUE, joined

_OURS, _THEIRS = 'layers.{stage}.{block}.', 'blocks.{stage}.{block}.'
_RULES = (
    *with_leaves(
        (
            ('patch_embeds.{stage}.projection', 'patch_embeds.{stage}.proj'),
            ('patch_embeds.{stage}.norm', 'patch_embeds.{stage}.norm'),
            ('position_encodings.{stage}.proj', 'pos_block.{stage}.proj.0'),
        )
    ),
    *with_leaves(
        (
            ('norm1', 'norm1'),
            ('attn.qkv', 'attn.qkv'),
            ('attn.proj', 'attn.proj'),
            ('attn.attn.out_proj', 'attn.out_proj'),
            ('attn.sr', 'attn.sr'),
            ('attn.norm', 'attn.norm'),
            ('norm2', 'norm2'),
            ('ffn.layers.0.0', 'mlp.fc1'),
            ('ffn.layers.1', 'mlp.fc2'),
        ),
        _OURS,
        _THEIRS,
    ),
    Rule(f'{_OURS}attn.attn.in_proj_{{leaf}}', f'{_THEIRS}attn.q_kv.{{leaf}}'),
)


def _told_apart(state: StateDict) -> StateDict:
    """Give projections of spatial-reduction attention names of their own."""
    joint = joined(state)
    reduced = {key.partition('.q_kv.')[0] for key in joint if '.attn.q_kv.' in key}
    return {
        key.replace('.proj.', '.out_proj.') if key.partition('.proj.')[0] in reduced else key: value
        for key, value in joint.items()
    }


def _alike(conversion: Conversion) -> Conversion:
    """The inverse of ``_told_apart``."""
    found = QUERY_KEY_VALUE.parted(conversion)
    state = {key.replace('.attn.out_proj.', '.attn.proj.'): v for key, v in found.state.items()}
    return found._replace(state=state)


_names = partial(
    KeyMap,
    theirs_only=re.compile(r'^head\.|^norm\.'),  # the classifier
    before=_told_apart,
    decoded=with_qkv_biases,
    encoded=_alike,
)
_TIMM = _names("timm's twins_*", _RULES, ours_only=re.compile(r'^norm_list\.'))
_norms = with_leaves([('norm_list.{stage}', 'norm_list.{stage}')])
_OFFICIAL = _names("the Twins release's", (*_RULES, *_norms))

_is_ours = with_keys('position_encodings.0.proj.weight')
_is_theirs = with_keys('pos_block.0.proj.0.weight')


def _is_official(state: StateDict) -> bool:
    return _is_theirs(state) and 'norm_list.0.weight' in state


def _is_timm(state: StateDict) -> bool:
    return _is_theirs(state) and not _is_official(state)


FORMATS = (
    Format('twins', OPENMMLAB, 'mmseg PCPVT and SVT', _is_ours, place='state_dict'),
    Format('twins', 'timm', 'timm twins_* or Twins', _is_timm, _TIMM),
    Format('twins', 'official', 'Twins release', _is_official, _OFFICIAL),
)
