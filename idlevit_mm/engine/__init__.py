from ..checkpoints import allow_mmengine_globals, load_checkpoint, strip_checkpoint
from ..errors import BrokenCheckpointError, SettingError, UnsafeCheckpointError, UsageError
from .runner import ResumableRunner

__all__ = [
    'BrokenCheckpointError',
    'ResumableRunner',
    'SettingError',
    'UnsafeCheckpointError',
    'UsageError',
    'allow_mmengine_globals',
    'load_checkpoint',
    'strip_checkpoint',
]
