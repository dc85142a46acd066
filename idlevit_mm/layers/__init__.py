"""Dense maths on packed tokens, with the parameter names of mmdet and mmseg."""

from .attention import SelfAttention, ShiftWindowMSA, SpatialReductionAttention
from .ffn import MixFFN
    'LayerNorm2d',
