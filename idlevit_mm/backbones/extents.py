"""What the images of a padded batch fill, for the stages of a backbone."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels import reads_values
from ..ops import Extent, Sizes, extent_of, filled_sizes

ImgShapes = Sequence[Sequence[int]] | None


class Extents(NamedTuple):
    """What the images of a batch fill.

    Attributes:
        pixels: Height and width for each image; None where all images fill the batch.
        strides: For each stage the distance of its tokens, in tokens or pixels before it.
    """

    pixels: Sizes | None
    strides: Sequence[int]

    @classmethod
    def of(cls, backbone: Any, images: Tensor, img_shapes: ImgShapes) -> 'Extents':
        """Of images (B, C, H, W) for an idle backbone; where nothing idles nobody asks."""
        asks = backbone.padded_images and min(chain(*backbone.keep_ratios)) < 1.0
        return cls(filled(images, img_shapes) if asks else None, backbone.strides)

    def at(self, stage: int, hw_shape: tuple[int, int], x: Tensor) -> Extent | None:
        """What they fill of the maps of a stage, whose tokens are x; None for all."""
        if self.pixels is None:
            return None
        return extent_of(self.pixels, math.prod(self.strides[: stage + 1]), hw_shape, x)


def filled(images: Tensor, img_shapes: ImgShapes) -> Sizes | None:
    """Height and width in pixels of what each of the images (B, C, H, W) fills of the batch.

    ``img_shapes`` says it, or where it is None the padding of the images. None where all is filled,
    or nobody may look because a graph is recorded, which is for any images of a size.

    Raises:
        ValueError: ``img_shapes`` are not those of such a batch.
    """
    if img_shapes is None:
        return filled_sizes(images) if reads_values(images) else None
    sizes = tuple((int(shape[0]), int(shape[1])) for shape in img_shapes)
    whole = images.shape[-2], images.shape[-1]
    fit = all(1 <= side <= limit for size in sizes for side, limit in zip(size, whole, strict=True))
    if len(sizes) != len(images) or not fit:
        raise ValueError(
            f'img_shapes={list(sizes)} must be {len(images)} sizes from 1x1 to '
            f'{whole[0]}x{whole[1]} pixels'
        )
    return sizes
