"""Heads for mmpretrain's ``ImageClassifier``, which is needed to import them.

A config names ``idlevit_mm.heads`` in ``custom_imports`` where it has one of them.
"""

from .classifiers import EvoViTClsHead, LVViTClsHead
