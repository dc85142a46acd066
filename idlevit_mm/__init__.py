"""Pyramid backbones for mmdet and mmseg that compute only the tokens that matter."""

from . import backbones, policies
from .version import __version__

__all__ = ['__version__', 'backbones', 'policies']
