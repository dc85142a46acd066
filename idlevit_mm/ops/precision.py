"""Computing in the precision of the tensors themselves, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device."""
    return device_type != 'meta' and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager:
    """Switch autocast off; the meta device has none."""
    if device_type == 'meta':
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
