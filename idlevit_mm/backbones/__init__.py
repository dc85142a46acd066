"""Backbones with idle tokens, registered in mmengine's root ``MODELS``."""

from .base import IdleBackbone
from .pvt import IdlePyramidVisionTransformer, IdlePyramidVisionTransformerV2
from .swin import IdleSwinTransformer

__all__ = [
    'IdleBackbone',
    'IdlePyramidVisionTransformer',
    'IdlePyramidVisionTransformerV2',
    'IdleSwinTransformer',
]
