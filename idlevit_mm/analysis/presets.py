"""Published backbones by name, and timm's twins of them.

A preset needs no config file and no mmdet. Settings are those of the papers: Swin arXiv
2103.14030, PVT arXiv 2102.12122, PVTv2 arXiv 2106.13797, MiT (SegFormer) arXiv 2105.15203.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from idlevit_mm import backbones as _backbones  # noqa: F401  (registers them)
from idlevit_mm.errors import UsageError
from idlevit_mm.registry import arguments_of


@dataclass(frozen=True)
class Preset:
    """One published backbone.

    Attributes:
        backbone: config of the idle backbone; everything not named is the class's default.
        timm: name of timm's model of the same architecture; None if timm has none.
    """

    backbone: Mapping[str, Any]
    timm: str | None = None


def _swin(middle: int, timm: str) -> Preset:
    heads = (3, 6, 12, 24)
    backbone = dict(embed_dims=96, depths=(2, 2, middle, 2), num_heads=heads, window_size=7)
    return Preset(dict(backbone, type='IdleSwinTransformer', drop_path_rate=0.1), timm)


def _pvt(num_layers: Sequence[int]) -> Preset:
    backbone = dict(type='IdlePyramidVisionTransformer', embed_dims=64, num_layers=num_layers)
    return Preset(dict(backbone, drop_path_rate=0.1))


def _pvtv2(embed_dims: int, num_layers: Sequence[int], timm: str) -> Preset:
    backbone = dict(embed_dims=embed_dims, num_layers=num_layers, drop_path_rate=0.1)
    return Preset(dict(backbone, type='IdlePyramidVisionTransformerV2'), timm)


def _mit(embed_dims: int, num_layers: Sequence[int]) -> Preset:
    backbone = dict(embed_dims=embed_dims, num_layers=num_layers, num_heads=(1, 2, 5, 8))
    return Preset(dict(backbone, type='IdleMixVisionTransformer', drop_path_rate=0.1))


PRESETS: dict[str, Preset] = {
    'swin-t': _swin(6, 'swin_tiny_patch4_window7_224'),
    'swin-s': _swin(18, 'swin_small_patch4_window7_224'),
    'pvt-t': _pvt((2, 2, 2, 2)),
    'pvt-s': _pvt((3, 4, 6, 3)),
    'pvtv2-b0': _pvtv2(32, (2, 2, 2, 2), 'pvt_v2_b0'),
    'pvtv2-b1': _pvtv2(64, (2, 2, 2, 2), 'pvt_v2_b1'),
    'pvtv2-b2': _pvtv2(64, (3, 4, 6, 3), 'pvt_v2_b2'),
    'mit-b0': _mit(32, (2, 2, 2, 2)),
    'mit-b1': _mit(64, (2, 2, 2, 2)),
    'mit-b2': _mit(64, (3, 4, 6, 3)),
}

# What leaves the work alone; all other arguments make an architecture.
_SAME_WORK = (
    *('keep_ratios', 'policy', 'init_cfg', 'pretrained', 'convert_weights', 'pretrain_img_size'),
    *('frozen_stages', 'with_cp', 'drop_rate', 'attn_drop_rate', 'drop_path_rate', 'norm_cfg'),
)


def preset_of(backbone: Mapping[str, Any]) -> Preset | None:
    """The preset of the same architecture as a backbone config; None if there is none."""
    wanted = _architecture(backbone)
    return next((p for p in PRESETS.values() if _architecture(p.backbone) == wanted), None)


def timm_twin(name: str, shape: tuple[int, int], drop_path_rate: float) -> nn.Module:
    """A model of timm as a backbone for images of one size, with random weights.

    Args:
        name: of timm's model.
        shape: (H, W) of the images in pixels. timm's Swin lays its windows out for one size; what
            is no multiple of 4 is padded, as mmdet's class does.
        drop_path_rate: of the last block.

    Returns:
        A module (B, 3, H, W) to the maps of all four stages.

    Raises:
        UsageError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"timm's {name} needs timm, which cannot be imported: {error}") from error
    options: dict[str, Any] = dict(features_only=True, drop_path_rate=drop_path_rate)
    if not name.startswith('swin'):
        return timm.create_model(name, pretrained=False, **options)
    padded = tuple(-(-side // 4) * 4 for side in shape)
    twin = timm.create_model(name, pretrained=False, img_size=padded, **options)
    return twin if padded == shape else nn.Sequential(_Pad(shape, padded), twin)


class _Pad(nn.ZeroPad2d):
    """Zeros at the right and at the bottom, from one size (H, W) to another."""

    def __init__(self, shape: tuple[int, ...], padded: tuple[int, ...]) -> None:
        super().__init__((0, padded[1] - shape[1], 0, padded[0] - shape[0]))


def _architecture(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What of a backbone config decides which work is done, defaults included."""
    cls = MODELS.get(backbone['type'])
    if cls is None:
        return dict(backbone)
    found: dict[str, Any] = dict(type=cls.__name__)
    for name, argument in arguments_of(cls).items():
        if name not in _SAME_WORK:
            found[name] = _plain(backbone.get(name, argument.default))
    return found


def _plain(value: Any) -> Any:
    """Lists as tuples, so that spellings of the same setting are equal."""
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value
