"""Dense maths on packed tokens, with the parameter names of mmdet and mmseg."""

from ..ops import pad_to, to_map, to_tokens
from .cosine_attention import ShiftCosineMSA
from .ffn import FeedForward, MixFFN
from .norm import LayerNorm2d
from .patch import ConvStemEmbed, EmbedPatches, MergePatches, MergeThenNorm, makes_anew
from .position import (
    AbsolutePositionEmbedding,
    ConditionalPositionEncoding,
    resize_position_table,
)
from .reduction_attention import SpatialReductionAttention
from .relative_attention import RelativeAttention, resize_axis_table
from .self_attention import SelfAttention
from .share import cell_means, kept_share
from .window_attention import LocallyGroupedAttention, ShiftWindowMSA, relative_position_index
