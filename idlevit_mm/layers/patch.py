"""Patch embedding with a convolutional stem.

Shape letters: B images, N tokens of the map (H * W), C channels.
"""

from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmengine.model import BaseModule
from torch import Tensor, nn

from .shape import to_tokens


class ConvStemEmbed(BaseModule):
    """LV-ViT's patch embedding: three convolutions before the patches (arXiv 2104.10858).

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of the tokens.
        patch_size: Side of a token in pixels; even.
        stem_channels: Channels of the stem.

    Raises:
        ValueError: ``patch_size`` is odd.
    """

    def __init__(
        self, in_channels: int, embed_dims: int, patch_size: int, stem_channels: int = 64
    ) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size={patch_size} must be even with stem='conv'")
        self.adap_padding = AdaptivePadding(patch_size, patch_size, padding='corner')
        layers: list[nn.Module] = []
        for index in range(3):
            size, stride = (7, 2) if index == 0 else (3, 1)
            conv = nn.Conv2d(in_channels, stem_channels, size, stride, size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(stem_channels), nn.ReLU(inplace=True)]
            in_channels = stem_channels
        self.stem = nn.Sequential(*layers)
        half = patch_size // 2
        self.projection = nn.Conv2d(stem_channels, embed_dims, half, half)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed images (B, 3, height, width): tokens (B, N, C) and (H, W)."""
        x = self.projection(self.stem(self.adap_padding(x)))
        return to_tokens(x), (x.shape[2], x.shape[3])
