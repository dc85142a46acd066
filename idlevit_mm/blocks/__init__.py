"""What every block with idle tokens does, once."""

from .idle_block import IdleBlock, weighted_mean
from .stage import StageRecord, run_blocks

__all__ = ['IdleBlock', 'StageRecord', 'run_blocks', 'weighted_mean']
