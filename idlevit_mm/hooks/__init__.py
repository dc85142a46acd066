from .atomic_checkpoint import AtomicCheckpointHook
from .exact_resume import ExactResumeHook
from .keep_ratio import KeepRatioWarmupHook, RandomKeepRatioHook

__all__ = [
    'AtomicCheckpointHook',
    'ExactResumeHook',
    'KeepRatioWarmupHook',
    'RandomKeepRatioHook',
]
