from .errors import BrokenCheckpointError, UnsafeCheckpointError, UsageError
from .runner import ResumableRunner
from .safe_load import allow_mmengine_globals, load_checkpoint, strip_checkpoint

__all__ = [
    'BrokenCheckpointError',
    'ResumableRunner',
    'UnsafeCheckpointError',
    'UsageError',
    'allow_mmengine_globals',
    'load_checkpoint',
    'strip_checkpoint',
]
