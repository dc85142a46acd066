"""Backbones for mmdet and mmseg that compute only the tokens that matter.

Importing the package registers its backbones, necks and hooks with mmengine, lets torch's safe
loading accept the checkpoints that mmengine itself writes, and idle blocks be recomputed by
mmengine's ``activation_checkpointing``.
"""

from . import backbones, engine, hooks, losses, necks, policies
from .version import __version__

__all__ = ['__version__', 'backbones', 'engine', 'hooks', 'losses', 'necks', 'policies']

engine.allow_mmengine_globals()
engine.mend_checkpointing()
