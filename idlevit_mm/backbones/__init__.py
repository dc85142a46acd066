"""Backbones with idle tokens, registered in mmengine's root ``MODELS``."""

from .base import IdleBackbone
from .swin import IdleSwinTransformer

# Messages list the families as they are imported, the most used one first.
# isort: split
from .mit import IdleMixVisionTransformer
from .pvt import IdlePyramidVisionTransformer, IdlePyramidVisionTransformerV2
from .swin_v2 import IdleSwinTransformerV2
from .twins import IdlePCPVT, IdleSVT
from .vit import IdleVisionTransformer
from .vitdet import IdleViTDet
