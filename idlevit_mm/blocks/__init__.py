"""What every block with idle tokens does, once."""

from .cost import IDLE_WHERE, Payer, Work, block_work, idle_work, layers, moves, seconds
from .functions import weighted_mean, without_cells
from .idle_block import IdleBlock
from .stage import Relay, StageRecord, run_blocks
from .tokens import Carried, Pack, Tokens
from .window_block import WindowBlock
