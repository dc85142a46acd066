"""Necks that a one-scale backbone needs, registered in mmengine's root ``MODELS``."""

from .simple_fpn import SimpleFeaturePyramid
