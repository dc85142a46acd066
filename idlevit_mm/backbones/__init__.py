"""Backbones with idle tokens, registered in mmengine's root ``MODELS``."""

from .base import IdleBackbone
from .mit import IdleMixVisionTransformer
from .pvt import IdlePyramidVisionTransformer, IdlePyramidVisionTransformerV2
from .swin import IdleSwinTransformer
from .vit import IdleVisionTransformer

__all__ = [
    'IdleBackbone',
    'IdleMixVisionTransformer',
    'IdlePyramidVisionTransformer',
    'IdlePyramidVisionTransformerV2',
    'IdleSwinTransformer',
    'IdleVisionTransformer',
]
