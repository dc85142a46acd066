"""Reading and writing of checkpoints, and what is told about their weights."""

from .files import TIMM, check_target, is_local, read_checkpoint, read_weights, write_weights
from .report import WeightsReport, compare, counted, of_policy, with_shapes
from .safe_load import load_checkpoint, without_advice
from .strip import config_text, strip_checkpoint
from .ways import allow_mmengine_globals, config_as_data
from .weights import BACKBONE, FOLLOWING, PACE, StateDict, split_backbone, unwrapped, weights_of
