"""Patch embedding and patch merging.

Shape letters: B images, N tokens of the map (H * W), C channels.
"""

from collections.abc import Sequence

from mmcv.cnn.bricks.transformer import AdaptivePadding, PatchEmbed, PatchMerging
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..kernels import backend_at, is_plain
from ..ops import to_map, to_tokens
from .position import AbsolutePositionEmbedding

# Channels of the convolutions before LV-ViT's patches.
_STEM = 64


class EmbedPatches(PatchEmbed):
    """mmcv's patch embedding, its norm by the backend's way."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed images (B, 3, height, width) or a map: tokens (B, N, C) and (H, W)."""
        x = self.projection(self.adaptive_padding(x) if self.adaptive_padding else x)
        tokens = x.flatten(2).transpose(1, 2)
        if self.norm is not None:
            tokens = backend_at(x).norm(tokens, self.norm)
        return tokens, (x.shape[2], x.shape[3])


class MergePatches(PatchMerging):
    """mmcv's patch merging, which costs one copy of the map where cells are 2 x 2 tokens.

    mmcv unfolds the map to rows that hold the four tokens of a cell channel by channel. Here rows
    hold one token after another, and the weights are put into that order instead.
    """

    def forward(self, x: Tensor, input_size: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Merge tokens (B, N, C) of a map of (H, W): (B, N / 4, O) and (H / 2, W / 2)."""
        if not self._pairs():
            return self._unfolded(x, input_size)
        padded = self.adaptive_padding(to_map(x, (input_size[0], input_size[1])))
        cells = padded.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        hw_shape = cells.shape[1], cells.shape[3]
        cells = cells.transpose(2, 3).reshape(x.shape[0], -1, self.reduction.in_features)
        width = self.reduction.in_features
        return backend_at(x).by_tokens(self._reduce, cells, width), hw_shape

    def _pairs(self) -> bool:
        """Whether cells are 2 x 2 tokens that do not overlap, and all parts are plain."""
        sampler = self.sampler
        return (
            is_plain(sampler, nn.Unfold)
            and is_plain(self.reduction, nn.Linear)
            and tuple(sampler.kernel_size) == tuple(sampler.stride) == (2, 2)
            and tuple(sampler.dilation) == (1, 1)
            and self.adaptive_padding is not None
            and (self.norm is None or is_plain(self.norm, nn.LayerNorm))
        )

    def _unfolded(self, x: Tensor, input_size: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        return super().forward(x, tuple(input_size))

    def _reduce(self, cells: Tensor) -> Tensor:
        norm = self.norm
        if norm is not None:
            weight, bias = (
                None if part is None else _token_by_token(part) for part in (norm.weight, norm.bias)
            )
            cells = backend_at(cells).layer_norm(cells, weight, bias, norm.eps)
        weight = _token_by_token(self.reduction.weight)
        return backend_at(cells).product(cells, weight, self.reduction.bias)


class MergeThenNorm(MergePatches):
    """Swin V2's merging of 2 x 2 tokens to twice the channels: the norm comes last.

    Args:
        in_channels: Channels of the tokens.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 2 * in_channels, norm_cfg=None)
        self.norm = nn.LayerNorm(2 * in_channels)

    def _unfolded(self, x: Tensor, input_size: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        padded = self.adaptive_padding(to_map(x, (input_size[0], input_size[1])))
        cells = self.sampler(padded).transpose(1, 2)
        return self.norm(self.reduction(cells)), (padded.shape[2] // 2, padded.shape[3] // 2)

    def _reduce(self, cells: Tensor) -> Tensor:
        weight = _token_by_token(self.reduction.weight)
        backend = backend_at(cells)
        return backend.norm(backend.product(cells, weight, self.reduction.bias), self.norm)


_MAKERS = (
    *(EmbedPatches, MergePatches, MergeThenNorm, AbsolutePositionEmbedding, AdaptivePadding),
    *(nn.Conv2d, nn.Unfold, nn.LayerNorm, nn.Linear, nn.Dropout),
)


def makes_anew(*layers: nn.Module) -> bool:
    """Whether nobody but the caller can hold the tokens that layers make, one after another."""
    return all(is_plain(part, *_MAKERS) for layer in layers for part in layer.modules())


def _token_by_token(weight: Tensor) -> Tensor:
    """Bring the last dimension (C * 4) from channel by channel to token by token."""
    return weight.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)


class ConvStemEmbed(BaseModule):
    """LV-ViT's patch embedding: three convolutions before the patches (arXiv 2104.10858).

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of the tokens.
        patch_size: Side of a token in pixels; even.

    Raises:
        ValueError: ``patch_size`` is odd.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size={patch_size} must be even with stem='conv'")
        self.adap_padding = AdaptivePadding(patch_size, patch_size, padding='corner')
        layers: list[nn.Module] = []
        for index in range(3):
            size, stride = (7, 2) if index == 0 else (3, 1)
            conv = nn.Conv2d(in_channels, _STEM, size, stride, size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(_STEM), nn.ReLU(inplace=True)]
            in_channels = _STEM
        self.stem = nn.Sequential(*layers)
        half = patch_size // 2
        self.projection = nn.Conv2d(_STEM, embed_dims, half, half)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed images (B, 3, height, width): tokens (B, N, C) and (H, W)."""
        x = self.projection(self.stem(self.adap_padding(x)))
        return to_tokens(x), (x.shape[2], x.shape[3])
