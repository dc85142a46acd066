"""What every block with idle tokens does, once."""

from .idle_block import IdleBlock

__all__ = ['IdleBlock']
