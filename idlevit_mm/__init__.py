"""Pyramid backbones for mmdet and mmseg that compute only the tokens that matter."""

from . import backbones, hooks, policies
from .engine import allow_mmengine_globals
from .version import __version__

__all__ = ['__version__', 'backbones', 'hooks', 'policies']

# A script of one's own that imports the package can resume and test mmengine's checkpoints too.
allow_mmengine_globals()
