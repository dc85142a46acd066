from ..errors import (
    BadSampleError,
    BrokenCheckpointError,
    SettingError,
    UnsafeCheckpointError,
    UsageError,
)
from .runner import ResumableRunner
from .safe_load import allow_mmengine_globals, load_checkpoint, strip_checkpoint

__all__ = [
    'BadSampleError',
    'BrokenCheckpointError',
    'ResumableRunner',
    'SettingError',
    'UnsafeCheckpointError',
    'UsageError',
    'allow_mmengine_globals',
    'load_checkpoint',
    'strip_checkpoint',
]
