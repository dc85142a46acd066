"""Which part of a padded batch belongs to its images.

Images of different sizes are padded at the bottom and at the right to share a batch.

Shape letters: B images, H and W of a stage's map in tokens, N = H * W, C channels.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import Units, window_numbers

Sizes = tuple[tuple[int, int], ...]


class Extent(NamedTuple):
    """The part of a stage's maps that images fill, from the top left.

    Attributes:
        sizes: Height and width of the part of each of B images, in tokens.
        inside: (B, N), whether a token belongs to its image.
        rows: (B, 1, H), weights of the rows in a mean over the part.
        cols: (B, 1, W), those of the columns.
    """

    sizes: Sizes
    inside: Tensor
    rows: Tensor
    cols: Tensor

    @property
    def most(self) -> int:
        """Tokens of the image that fills most."""
        return max(height * width for height, width in self.sizes)


def filled_sizes(images: Tensor) -> Sizes | None:
    """Height and width in pixels of the part that each of the images (B, C, H, W) fills.

    The rest is padding: rows at the bottom and columns at the right that are, in all pixels, what
    the last pixel is; a single pixel is none. An image of one value fills all. None where all
    images do.
    """
    whole = images.shape[-2], images.shape[-1]
    # Four pixels tell most batches that are not padded.
    steps = [max(side - 1, 1) for side in whole]
    corners = images[..., :: steps[0], :: steps[1]].permute(0, 2, 3, 1).tolist()
    if not any(one[-1][-1] in (one[-1][0], one[0][-1]) for one in corners):
        return None
    last, sides = images[..., -1:, -1:], []
    for axis in (-1, -2):
        most, least = images.amax(axis), images.amin(axis)
        filled = ~((most == last[..., 0]) & (least == last[..., 0])).all(dim=1)
        places = torch.arange(1, filled.shape[1] + 1, device=images.device)
        sides.append((filled * places).amax(dim=1))
    area = whole[0] * whole[1]
    sizes = tuple(
        (height, width) if 0 < height * width < area - 1 else whole
        for height, width in torch.stack(sides, dim=1).tolist()
    )
    return None if all(size == whole for size in sizes) else sizes


def extent_of(pixels: Sizes, stride: int, hw_shape: tuple[int, int], x: Tensor) -> Extent | None:
    """What images that fill so many pixels fill of maps whose tokens are ``stride`` pixels apart.

    For tokens x; None where all of the maps.
    """
    sizes = tuple(
        tuple(min(-(-side // stride), limit) for side, limit in zip(size, hw_shape, strict=True))
        for size in pixels
    )
    if all(size == hw_shape for size in sizes):
        return None
    limits = torch.tensor(sizes, device=x.device)
    filled = [
        torch.arange(side, device=x.device) < limits[:, axis, None]
        for axis, side in enumerate(hw_shape)
    ]
    inside = filled[0][:, :, None] & filled[1][:, None]
    weights = [(mask / mask.sum(1, keepdim=True)).to(x.dtype)[:, None] for mask in filled]
    return Extent(sizes, inside.flatten(1), *weights)  # type: ignore[arg-type]


def mean_inside(tokens: Tensor, hw_shape: tuple[int, int], extent: Extent | None) -> Tensor:
    """Mean of the tokens (B, N, C) that belong to their images: (B, 1, C)."""
    if extent is None:
        return tokens.mean(dim=1, keepdim=True)
    # One axis after the other, as products: what is padded makes gaps, and images differ.
    rows, cols = extent.rows.to(tokens.dtype), extent.cols.to(tokens.dtype)
    means = rows @ tokens.unflatten(1, hw_shape).flatten(2)
    return cols @ means.view(len(tokens), hw_shape[1], -1)


def units_inside(units: Units, hw_shape: tuple[int, int], extent: Extent | None) -> Units:
    """Units of which padding is none: as many count as in the image that fills most."""
    if extent is None:
        return units
    sizes = extent.sizes
    if units.in_order:
        return units._replace(valid=(extent.most,), inside=extent.inside)
    # By numbers, not by tensors: a device is not waited for.
    rows, cols = (np.arange(side) for side in hw_shape)
    inside = [((rows < h)[:, None] & (cols < w)).reshape(-1) for h, w in sizes]
    ids = window_numbers(*hw_shape, *units.windows).token_ids
    held = np.pad(np.stack(inside), ((0, 0), (0, 1)))[:, ids]
    whole = units.token_ids.shape[1:] == ids.shape
    counts = held.any(axis=2).sum(axis=1, keepdims=True) if whole else held.sum(axis=2)
    return units._replace(valid=tuple(counts.max(axis=0).tolist()), inside=extent.inside)
