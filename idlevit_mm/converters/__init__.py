"""Key maps between released checkpoints and the names of mmdet and mmseg."""

from .official import is_official_pvt, is_official_swin, pvt_from_official, swin_from_official

__all__ = ['is_official_pvt', 'is_official_swin', 'pvt_from_official', 'swin_from_official']
