"""Dense maths on packed tokens, with the parameter names of mmdet and mmseg."""

from .attention import ShiftWindowMSA, SpatialReductionAttention
from .ffn import MixFFN
from .norm import LayerNorm2d
from .position import (
    AbsolutePositionEmbedding,
    resize_position_table,
    resize_relative_position_table,
)
from .shape import pad_to, to_map, to_tokens

__all__ = [
    'AbsolutePositionEmbedding',
    'LayerNorm2d',
    'MixFFN',
    'ShiftWindowMSA',
    'SpatialReductionAttention',
    'pad_to',
    'resize_position_table',
    'resize_relative_position_table',
    'to_map',
    'to_tokens',
]
