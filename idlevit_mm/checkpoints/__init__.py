"""Reading and writing of checkpoints, and what is told about their weights."""

from .files import TIMM, check_target, is_local, read_checkpoint, read_weights, write_weights
from .report import WeightsReport, compare, counted, of_policy, with_shapes
from .safe_load import load_checkpoint, without_advice
from .strip import config_text, strip_checkpoint
from .ways import allow_mmengine_globals
from .weights import BACKBONE, StateDict, split_backbone, unwrapped, weights_of

__all__ = [
    'BACKBONE',
    'TIMM',
    'StateDict',
    'WeightsReport',
    'allow_mmengine_globals',
    'check_target',
    'compare',
    'config_text',
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
    'without_advice',
    'write_weights',
]
