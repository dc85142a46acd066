"""Reading and writing of checkpoints, and what is told about their weights."""

from .files import TIMM, check_target, is_local, read_checkpoint, read_weights, write_weights
from .report import WeightsReport, compare, counted, of_policy, with_shapes
from .safe_load import allow_mmengine_globals, load_checkpoint, strip_checkpoint
from .weights import BACKBONE, StateDict, split_backbone, unwrapped, weights_of

__all__ = [
    'BACKBONE',
    'TIMM',
    'StateDict',
    'WeightsReport',
    'allow_mmengine_globals',
    'check_target',
    'compare',
    'counted',
    'is_local',
    'load_checkpoint',
    'of_policy',
    'read_checkpoint',
    'read_weights',
    'split_backbone',
    'strip_checkpoint',
    'unwrapped',
    'weights_of',
    'with_shapes',
    'write_weights',
]
