"""Published backbones by name, and timm's twins of them.

A preset needs no config file and no mmdet. Settings are those of the papers: Swin arXiv
2103.14030, Swin V2 arXiv 2111.09883, PVT arXiv 2102.12122, PVTv2 arXiv 2106.13797, MiT (SegFormer)
arXiv 2105.15203, Twins arXiv 2104.13840, DINOv2 arXiv 2304.07193, ViTDet arXiv 2203.16527.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import idlevit_mm  # noqa: F401  (registers the backbones)

_RATE = dict(drop_path_rate=0.1)
_SWIN = dict(_RATE, type='IdleSwinTransformer', embed_dims=96, num_heads=(3, 6, 12, 24))
_W12 = dict(window_size=12, pretrain_img_size=384)
_PVT = dict(_RATE, type='IdlePyramidVisionTransformer', embed_dims=64)
_PVTV2 = dict(_RATE, type='IdlePyramidVisionTransformerV2')
_MIT = dict(_RATE, type='IdleMixVisionTransformer', num_heads=(1, 2, 5, 8))
_PCPVT = dict(_RATE, type='IdlePCPVT', embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8))
_PCPVT |= dict(mlp_ratios=(8, 8, 4, 4), qkv_bias=True)
_SVT = dict(_RATE, type='IdleSVT', mlp_ratios=(4,) * 4, windiow_sizes=(7,) * 4, qkv_bias=True)
_SVT |= dict(sr_ratios=(8, 4, 2, 1))
_VIT = dict(_RATE, type='IdleVisionTransformer')
_SMALL, _LARGE = (2, 2, 2, 2), (3, 4, 6, 3)

# Configs of idle backbones; everything not named is the class's default.
PRESETS: dict[str, dict[str, Any]] = {
    'swin-t': dict(_SWIN, depths=(2, 2, 6, 2)),
    'swin-s': dict(_SWIN, depths=(2, 2, 18, 2)),
    'swin-b': dict(_SWIN, embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'swin-l': dict(_SWIN, embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), **_W12),
    'swinv2-t': dict(_RATE, type='IdleSwinTransformerV2', arch='tiny'),
    'pvt-t': dict(_PVT, num_layers=_SMALL),
    'pvt-s': dict(_PVT, num_layers=_LARGE),
    'pvtv2-b0': dict(_PVTV2, embed_dims=32, num_layers=_SMALL),
    'pvtv2-b1': dict(_PVTV2, embed_dims=64, num_layers=_SMALL),
    'pvtv2-b2': dict(_PVTV2, embed_dims=64, num_layers=_LARGE),
    'pvtv2-b3': dict(_PVTV2, embed_dims=64, num_layers=(3, 4, 18, 3)),
    'pvtv2-b4': dict(_PVTV2, embed_dims=64, num_layers=(3, 8, 27, 3)),
    'pvtv2-b5': dict(_PVTV2, embed_dims=64, num_layers=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
    'mit-b0': dict(_MIT, embed_dims=32, num_layers=_SMALL),
    'mit-b1': dict(_MIT, embed_dims=64, num_layers=_SMALL),
    'mit-b2': dict(_MIT, embed_dims=64, num_layers=_LARGE),
    'mit-b3': dict(_MIT, embed_dims=64, num_layers=(3, 4, 18, 3)),
    'mit-b4': dict(_MIT, embed_dims=64, num_layers=(3, 8, 27, 3)),
    'mit-b5': dict(_MIT, embed_dims=64, num_layers=(3, 6, 40, 3)),
    'pcpvt-s': dict(_PCPVT, depths=_LARGE),
    'svt-s': dict(
        _SVT, embed_dims=(64, 128, 256, 512), depths=(2, 2, 10, 4), num_heads=(2, 4, 8, 16)
    ),
    'dinov2-s': dict(_VIT, arch='dinov2-small'),
    'dinov2-b': dict(_VIT, arch='dinov2-base'),
    'dinov2-l': dict(_VIT, arch='dinov2-large'),
    'vitdet-b': dict(_RATE, type='IdleViTDet', arch='vitdet-base'),
    'vitdet-l': dict(_RATE, type='IdleViTDet', arch='vitdet-large'),
}
# Names of timm's models of the same architecture, where it has one.
TIMM = {
    'swin-t': 'swin_tiny_patch4_window7_224',
    'swin-s': 'swin_small_patch4_window7_224',
    'swin-b': 'swin_base_patch4_window7_224',
    'swin-l': 'swin_large_patch4_window12_384',
    'swinv2-t': 'swinv2_tiny_window8_256',
    **{f'pvtv2-b{number}': f'pvt_v2_b{number}' for number in range(6)},
    'pcpvt-s': 'twins_pcpvt_small',
    'svt-s': 'twins_svt_small',
    'dinov2-s': 'vit_small_patch14_dinov2',
    'dinov2-b': 'vit_base_patch14_dinov2',
    'dinov2-l': 'vit_large_patch14_dinov2',
}


def timm_twin(name: str, shape: tuple[int, int], drop_path_rate: float) -> nn.Module:
    """A model of timm as a backbone for images of a size (H, W) in pixels, with random weights.

    It returns the maps of all stages, of a plain ViT the last one. timm's Swin lays its windows out
    for one size; what is no multiple of 4 is padded, as mmdet's class does.
    """
    import timm

    options: dict[str, Any] = dict(features_only=True, drop_path_rate=drop_path_rate)
    if name.startswith('vit'):
        options |= dict(out_indices=[-1], dynamic_img_size=True, dynamic_img_pad=True)
    if not name.startswith('swin'):
        return timm.create_model(name, **options)
    bottom, right = (-side % 4 for side in shape)
    padded = shape[0] + bottom, shape[1] + right
    twin = timm.create_model(name, img_size=padded, **options)
    return nn.Sequential(nn.ZeroPad2d((0, right, 0, bottom)), twin) if bottom or right else twin
