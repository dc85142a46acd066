"""Shapes of plain vision transformers by name, and which of them mmseg's class has."""

from collections.abc import Mapping
from typing import Any

from ..checkpoints import StateDict
from ..errors import SettingError

# Whose presence tells weights with layer scale.
SCALE = 'layers.0.attn.gamma1.weight'

_PLAIN = dict(
    img_size=224,
    patch_size=16,
    mlp_ratio=4,
    stem='patch',
    residual_scale=1.0,
    layer_scale=0.0,
    norm_cfg=dict(type='LN', eps=1e-6),
    interpolate_mode='bicubic',
)
_LVVIT = dict(
    _PLAIN, mlp_ratio=3, stem='conv', residual_scale=0.5, norm_cfg=dict(type='LN', eps=1e-5)
)
_DINOV2 = dict(_PLAIN, img_size=518, patch_size=14, layer_scale=1e-5, interpolate_mode='bicubic-aa')
ARCHS: dict[str, dict[str, Any]] = {
    'deit-tiny': dict(_PLAIN, embed_dims=192, num_layers=12, num_heads=3),
    'deit-small': dict(_PLAIN, embed_dims=384, num_layers=12, num_heads=6),
    'deit-base': dict(_PLAIN, embed_dims=768, num_layers=12, num_heads=12),
    'lvvit-small': dict(_LVVIT, embed_dims=384, num_layers=16, num_heads=6),
    'lvvit-medium': dict(_LVVIT, embed_dims=512, num_layers=20, num_heads=8),
    'dinov2-small': dict(_DINOV2, embed_dims=384, num_layers=12, num_heads=6),
    'dinov2-base': dict(_DINOV2, embed_dims=768, num_layers=12, num_heads=12),
    'dinov2-large': dict(_DINOV2, embed_dims=1024, num_layers=24, num_heads=16),
}


def shape_of(
    arch: str | Mapping[str, Any], archs: Mapping[str, Mapping[str, Any]], **given: Any
) -> dict[str, Any]:
    """Shape of an architecture by name or itself, with the given values in place of its own.

    Raises:
        ValueError: A name is unknown, or widths do not fit.
    """
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(f'arch={arch!r} is unknown; allowed: {", ".join(archs)}')
        arch = archs[arch]
    shape = {**arch, **{key: value for key, value in given.items() if value is not None}}
    if shape.get('stem', 'patch') not in ('patch', 'conv'):
        raise ValueError(f'stem={shape["stem"]!r} is unknown; allowed: patch, conv')
    if shape['embed_dims'] % shape['num_heads']:
        raise ValueError(
            f'embed_dims={shape["embed_dims"]} must be a multiple of num_heads={shape["num_heads"]}'
        )
    return shape


def check_kind(state: StateDict, own: StateDict) -> None:
    """A SettingError tells of layer scale or registers that only weights or backbone have.

    Without them features would be others, though no weight has another shape.
    """
    theirs, ours = _kind_of(state), _kind_of(own)
    for name, value in ours.items():
        if 'cls_token' in state and value != theirs[name]:
            raise SettingError(
                f'{name}={value} of IdleVisionTransformer; allowed: {name}={theirs[name]}, as the '
                'checkpoint has it (arch sets layer_scale)'
            )


def _kind_of(state: StateDict) -> dict[str, Any]:
    registers = state['register_tokens'].shape[1] if 'register_tokens' in state else 0
    return dict(layer_scale=SCALE in state, num_registers=registers)


def check_dense(shape: dict[str, Any]) -> None:
    """A ValueError tells what of a shape mmseg's class has not."""
    mode = shape['interpolate_mode'].removesuffix('-aa')
    plain = dict(stem='patch', residual_scale=1.0, layer_scale=0.0, num_registers=0)
    for key, value in (plain | dict(interpolate_mode=mode)).items():
        if shape[key] != value:
            raise ValueError(
                f'backbone=IdleVisionTransformer with {key}={shape[key]!r} (as LV-ViT or DINOv2 '
                f"has it) has no dense class: mmseg's VisionTransformer is {key}={value!r} alone. "
                'Compare with keep_ratios=1.0 instead'
            )
    if shape['mlp_ratio'] != int(shape['mlp_ratio']):
        raise ValueError(
            f'backbone=IdleVisionTransformer with mlp_ratio={shape["mlp_ratio"]} has no dense '
            "class: mmseg's VisionTransformer takes whole numbers. Compare with "
            'keep_ratios=1.0 instead'
        )
