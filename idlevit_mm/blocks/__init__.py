"""What every block with idle tokens does, once."""

from .idle_block import IdleBlock, weighted_mean
from .stage import StageRecord, run_blocks
from .tokens import Carried, Pack, Tokens

__all__ = ['Carried', 'IdleBlock', 'Pack', 'StageRecord', 'Tokens', 'run_blocks', 'weighted_mean']
