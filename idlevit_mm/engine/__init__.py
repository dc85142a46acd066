from ..checkpoints import allow_mmengine_globals, load_checkpoint, strip_checkpoint
from ..errors import (
    BadSampleError,
    BrokenCheckpointError,
    CheckpointError,
    SettingError,
    UnsafeCheckpointError,
    UsageError,
)
from .mends import mend_checkpointing
from .runner import ResumableRunner
from .sharding import FullyShardedModel

__all__ = [
    'BadSampleError',
    'BrokenCheckpointError',
    'CheckpointError',
    'FullyShardedModel',
    'ResumableRunner',
    'SettingError',
    'UnsafeCheckpointError',
    'UsageError',
    'allow_mmengine_globals',
    'load_checkpoint',
    'mend_checkpointing',
    'strip_checkpoint',
]
