"""Registries of the parts a config names; backbones go to mmengine's root ``MODELS``."""

from mmengine.registry import Registry

POLICIES = Registry('idling policy', locations=['idlevit_mm.policies'])
SCORERS = Registry('token scorer', locations=['idlevit_mm.policies'])
AUXILIARY_LOSSES = Registry('auxiliary loss', locations=['idlevit_mm.losses'])
