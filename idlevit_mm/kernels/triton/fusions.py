"""Which products are fused with what surrounds them, and which are the library's.

Shape letters: B images, N tokens of the map (H * W), K active tokens of an image, C channels, O
channels out.
"""

from typing import Any

import torch.nn.functional as F
from mmcv.cnn.bricks.drop import DropPath
from torch import Tensor, nn

from ...ops import Rows
from ..backends import backend_at
from ..plain import LINEAR, all_plain, is_plain, kind_of
from ..site import site_of
from . import layers, ops

# The most channels of tokens for which a norm is fused into the product behind it, and rows are
# put back by the product before. Rows of a norm are kept whole while all columns are made of them:
# wider ones would not fit beside a tile of weights; and beyond, a library's product is so much
# faster that what it reads and writes besides costs less (computed by bytes and peaks).
WIDEST = 192
# The same for both layers of an MLP in one kernel: beyond, weights that each tile of rows reads
# anew cost what hidden channels would; and for spatial reduction: beyond, tiles of columns would
# read the map once each.
ONE_KERNEL = 128


def infers(x: Tensor) -> bool:
    """Whether kernels may stand for whole layers: neither gradients nor autocast are wanted."""
    site = site_of(x)
    return not (site.grad or site.autocast)


def is_norm(norm: Any) -> bool:
    """Whether it is a plain LayerNorm with scale and shift."""
    return is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def weights_of(norm: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Scale, shift and epsilon."""
    return norm.weight, norm.bias, norm.eps


def are_idle(*drops: nn.Module) -> bool:
    """Whether layers leave all as it is."""
    return all(
        is_plain(drop, nn.Identity) or (is_plain(drop, nn.Dropout, DropPath) and not drop.training)
        for drop in drops
    )


def project(
    x: Tensor,
    ids: Tensor | None,
    norm: nn.Module | None,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool = False,
) -> Tensor:
    """A linear layer, maybe GELU, of the norm of rows (B, K) of x (B, N, C), or of all: (B, K, O).

    Where there are ids, the norm is plain or there is none.
    """
    weights: tuple[Any, Any, float] = (None, None, 0.0)
    if is_norm(norm) and x.shape[2] <= WIDEST:
        weights = weights_of(norm)
    elif norm is not None:
        taken = ids is not None
        x = (
            layers.linear(x, ids, *weights_of(norm), None, None, False)
            if taken
            else backend_at(x).norm(x, norm)
        )
        ids = None
    if gelu or ids is not None or weights[0] is not None:
        return layers.linear(x, ids, *weights, weight, bias, gelu)
    return F.linear(x, weight, bias)


def mlp(
    norm: nn.Module, ffn: nn.Module, x: Tensor, hw_shape: tuple[int, int], rows: Rows | None
) -> tuple[Tensor | None, list[Tensor]] | None:
    """The branch of an MLP on rows x (B, K, C) as ``add_branch`` takes it; None if it is other.

    It is made, it is what the last layer is to be applied to, or all of it is yet to be done.
    """
    parts = _layers_of(ffn)
    if parts is None:
        return None
    *convolutions, first, second = parts
    weight, *last = (
        part for layer in (first, second) for part in (layer.weight.flatten(1), layer.bias)
    )
    bias, *last = last
    if not convolutions and x.shape[2] <= ONE_KERNEL and is_norm(norm):
        return None, [norm.weight, norm.bias, weight, bias, *last]
    hidden = project(x, None, norm, weight, bias, gelu=not convolutions)
    for conv in convolutions:
        ids, places = (None, None) if rows is None else (rows.ids, rows.places)
        hidden = ops.convolve_gelu(hidden, ids, places, conv.weight, conv.bias, hw_shape)
    if x.shape[2] <= WIDEST:
        return hidden, last
    return F.linear(hidden, *last), []


def _layers_of(ffn: nn.Module) -> list[Any] | None:
    """Its depth-wise convolution, if it has one, and its two linear layers; None if it is other."""
    if not all_plain(ffn):
        return None
    if kind_of(ffn) == 'FeedForward' and ffn.add_identity:
        (first, act, drop), second, last_drop = ffn.layers
        found, drops = [first, second], [drop, last_drop, ffn.gamma2, ffn.dropout_layer]
        kinds: tuple[Any, ...] = LINEAR
    elif kind_of(ffn) == 'MixFFN':
        first, *convolutions, act, drop, second, last_drop = ffn.layers
        found, drops = [*convolutions, first, second], [drop, last_drop, ffn.dropout_layer]
        kinds = (nn.Conv2d,)
    else:
        return None
    fits = (
        are_idle(*drops)
        and is_plain(act, nn.GELU)
        and act.approximate == 'none'
        and all(is_plain(layer, *kinds) and layer.bias is not None for layer in found[-2:])
        and all(conv.kernel_size == (3, 3) for conv in found[:-2])
    )
    return found if fits else None


def reduces(block: Any) -> bool:
    """Whether the norm and the reduction of a block of PVT are one kernel."""
    attn, channels = block.attn, block.embed_dims
    if kind_of(attn) != 'SpatialReductionAttention' or attn.sr_ratio == 1:
        return False
    conv, side = attn.sr, (attn.sr_ratio,) * 2
    return (
        channels <= ONE_KERNEL
        and is_norm(block.norm1)
        and is_plain(attn, type(attn))
        and is_plain(conv, nn.Conv2d)
        and conv.weight.shape == (channels, channels, *side)
        and (conv.stride, conv.padding, conv.dilation) == (side, (0, 0), (1, 1))
    )


def reduced(
    block: Any,
    x: Tensor,
    hw_shape: tuple[int, int],
    score: str = '',
    mean: Tensor | None = None,
    changes: Tensor | None = None,
) -> list[Tensor]:
    """Cells of the normalised map x (B, N, C), and scores if they are wanted."""
    conv = block.attn.sr
    weight = conv.weight.permute(0, 2, 3, 1).contiguous()
    norm = weights_of(block.norm1)
    return layers.reduce_map(x, score, mean, changes, *norm, weight, conv.bias, hw_shape)
