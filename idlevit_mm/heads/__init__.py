"""Heads for mmpretrain's ``ImageClassifier``, which is needed to import them.

A config names ``idlevit_mm.heads`` in ``custom_imports`` where it has one of them.
"""

from .evovit_head import EvoViTClsHead
from .lvvit_head import LVViTClsHead
