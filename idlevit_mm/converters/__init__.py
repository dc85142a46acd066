"""Key maps between released checkpoints and the names of mmdet and mmseg."""

from .official import is_official_pvt, is_official_swin, pvt_from_official, swin_from_official
from .timm import is_lvvit, is_timm_vit, lvvit_from_official, vit_from_timm, vit_to_timm

__all__ = [
    'is_lvvit',
    'is_official_pvt',
    'is_official_swin',
    'is_timm_vit',
    'lvvit_from_official',
    'pvt_from_official',
    'swin_from_official',
    'vit_from_timm',
    'vit_to_timm',
]
