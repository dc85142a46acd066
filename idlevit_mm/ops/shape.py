"""Views between token sequences and maps.

Shape letters: B images, N tokens of the map (H * W), C channels.
"""

import torch.nn.functional as F
from torch import Tensor


def to_map(tokens: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """(B, N, C) to (B, C, H, W), a view in channels-last memory."""
    return tokens.unflatten(1, hw_shape).permute(0, 3, 1, 2)


def to_tokens(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) to (B, N, C)."""
    return feature_map.flatten(2).transpose(1, 2)


def pad_to(feature_map: Tensor, height: int, width: int) -> Tensor:
    """Pad with zeros at the bottom and right to at least (height, width)."""
    missing_rows = max(height - feature_map.shape[-2], 0)
    missing_cols = max(width - feature_map.shape[-1], 0)
    if missing_rows or missing_cols:
        feature_map = F.pad(feature_map, (0, missing_cols, 0, missing_rows))
    return feature_map
