"""How much of each token's attention goes to active tokens, without the matrix of all pairs.

Shape letters: B images, N tokens that attend, K keys, C channels, V masks, r side of a cell.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import pad_to, to_map, to_tokens


def kept_share(
    query: Tensor, key: Tensor, mask: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Sum over keys j of W_ij * mask_j, with W the softmax over j of the head-mean logits.

    The mean over heads of the logits of each head is the logit of all channels at once, divided by
    the number of heads. So this is an attention of one head whose values are the mask, and fused
    kernels compute it without storing W.

    Args:
        query: (..., N, C), the queries of all heads side by side.
        key: (..., K, C).
        mask: (..., K) or (..., K, V); 1 for active keys, 0 for idle ones. Without gradient.
        scale: Factor of the logits of a head, divided by the number of heads.
        bias: (..., N, K), head mean of what is added to the logits.

    Returns:
        (..., N) or (..., N, V), in [0, 1] and in the precision of ``query``.
    """
    single = mask.dim() < key.dim()
    value = (mask[..., None] if single else mask).to(query.dtype)
    masks = value.shape[-1]
    if bias is None:
        # Fused kernels want values as wide as keys; a bias with a gradient rules them out anyway.
        value = F.pad(value, (0, max(key.shape[-1] - masks, 0)))
    headless = query.dim() == 3
    if headless:  # and they want a dimension of heads
        query, key, value = query[:, None], key[:, None], value[:, None]
        bias = None if bias is None else bias[:, None]
    share = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    share = share.squeeze(1) if headless else share
    return share[..., 0] if single else share[..., :masks]


def cell_means(mask: Tensor, hw_shape: tuple[int, int], side: int) -> Tensor:
    """Mean of a mask (B, N, V) over the cells of a convolution of kernel and stride ``side``.

    Rows and columns of the map that fill no cell are left out; a map smaller than a cell is one
    cell of the tokens that are there.
    """

    def sums(tokens: Tensor) -> Tensor:
        return F.avg_pool2d(pad_to(to_map(tokens, hw_shape), side, side), side)

    return to_tokens(sums(mask) / sums(torch.ones_like(mask)))
