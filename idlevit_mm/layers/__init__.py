"""Dense maths on packed tokens, with the parameter names of mmdet and mmseg."""

from .ffn import MixFFN
from .norm import LayerNorm2d
from .patch import ConvStemEmbed
from .position import (
    AbsolutePositionEmbedding,
    resize_position_table,
    resize_relative_position_table,
)
from .reduction_attention import SpatialReductionAttention
from .self_attention import SelfAttention
from .shape import pad_to, to_map, to_tokens
from .share import cell_means, kept_share
from .window_attention import ShiftWindowMSA

__all__ = [
    'AbsolutePositionEmbedding',
    'ConvStemEmbed',
    'LayerNorm2d',
    'MixFFN',
    'SelfAttention',
    'ShiftWindowMSA',
    'SpatialReductionAttention',
    'cell_means',
    'kept_share',
    'pad_to',
    'resize_position_table',
    'resize_relative_position_table',
    'to_map',
    'to_tokens',
]
