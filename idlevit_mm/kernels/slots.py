"""Attention within windows of which all slots are there: shapes follow from those of the input.

That is what torch.compile and CUDA graphs need. Packed tokens are written to their slots, idle ones
are masked as keys, and active slots are read back.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels, A heads, M windows, L slots of a window, E border windows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Rows, WindowLayout
from .site import site_of


class WindowCore(NamedTuple):
    """What attention within windows needs beside queries, keys and values.

    Attributes:
        bias: (1, A, L, L), relative position bias of slot pairs.
        blank: (3 * C,), query, key and value of padding.
        window_size: Side of a window in tokens.
        num_heads: A.
        scale: Factor of the logits.
        dropout: Of the attention weights.
        drop: A module that is to see the attention weights, in place of ``dropout``.
        pairs: Bias that depends on queries: (windows, A, L, C / A) to (windows, A, L, L).
        hides_padding: Whether padding is no key.
        apart: What is added to logits of tokens that the shift alone brought into one window; None
            hides them.
    """

    bias: Tensor
    blank: Tensor
    window_size: int
    num_heads: int
    scale: float
    dropout: float = 0.0
    drop: nn.Module | None = None
    pairs: Callable[[Tensor], Tensor] | None = None
    hides_padding: bool = False
    apart: float | None = None

    def to(self, dtype: torch.dtype) -> 'WindowCore':
        """The same in another precision."""
        return WindowCore(self.bias.to(dtype), self.blank.to(dtype), *self[2:])


def attend_slots(
    qkv: Tensor, core: WindowCore, layout: WindowLayout, token_ids: Tensor | None
) -> Tensor:
    """Attention of active tokens and of summaries among all windows of a map.

    (B, T + R, 3 * C) to (B, T + R, C), R is M or 0; ``token_ids`` (B, T) is None if all are active.
    """
    core = core.to(qkv.dtype)
    batch, _, channels = qkv.shape
    windows, slots = layout.token_ids.shape
    places = layout.slot_ids if token_ids is None else layout.slot_ids[token_ids]
    # Images vary fastest among windows, so that the border windows of a batch are one slice.
    image = torch.arange(batch, device=qkv.device)[:, None]
    rows = ((places // slots * batch + image) * slots + places % slots).flatten()
    num_tokens = places.shape[-1]
    tokens, summaries = qkv.split_with_sizes([num_tokens, qkv.shape[1] - num_tokens], dim=1)
    blank = core.blank if layout.has_padding else qkv.new_zeros(())
    filled = blank.expand(batch * windows * slots, channels)
    filled = filled.index_copy(0, rows, tokens.flatten(0, 1)).view(batch * windows, slots, -1)
    if token_ids is None:
        out = _attend_dense(filled, core, layout, batch)
        return out.flatten(0, 1).index_select(0, rows).view(batch, -1, channels // 3)
    mask = _active_mask(core, layout, rows, batch, summaries.shape[1] > 0)
    if summaries.shape[1]:
        extra = summaries.transpose(0, 1).reshape(batch * windows, 1, channels)
        filled = torch.cat([filled, extra], dim=1)
    out = _attend(filled, core, mask)
    tokens = out[:, :slots].flatten(0, 1).index_select(0, rows)
    summaries = out[:, slots:].reshape(-1, batch, channels // 3).transpose(0, 1)
    return torch.cat([tokens.view(batch, -1, channels // 3), summaries], dim=1)


def attend_whole_windows(qkv: Tensor, core: WindowCore, layout: WindowLayout, rows: Rows) -> Tensor:
    """Attention within active windows, which are packed already: (B, T, 3 * C) to (B, T, C)."""
    core = core.to(qkv.dtype)
    if rows.padded:
        qkv = torch.where((rows.ids < 0)[..., None], core.blank, qkv)
    mask = core.bias
    if len(layout.regions):
        mask = mask + _regions_of(layout, rows.windows, core)
    windows = qkv.view(-1, layout.token_ids.shape[1], qkv.shape[2])
    return _attend(windows, core, mask).view(*qkv.shape[:2], -1)


def region_mask(layout: WindowLayout, dtype: torch.dtype, apart: float | None = None) -> Tensor:
    """Mask of slot pairs of different regions of the border windows: (E, 1, L, L)."""
    different = layout.regions[:, :, None] != layout.regions[:, None, :]
    mask = hide(different, dtype) if apart is None else apart * different.to(dtype)
    return mask[:, None]


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: far below any logit where True, yet finite so that a hidden row is not NaN."""
    return hidden.new_zeros(hidden.shape, dtype=dtype).masked_fill(hidden, hidden_logit(dtype))


def hidden_logit(dtype: torch.dtype) -> float:
    """What hides a key."""
    return torch.finfo(dtype).min / 4


def join_heads(heads: Tensor) -> Tensor:
    """(B, A, T, C / A) to (B, T, C)."""
    tokens = heads.transpose(1, 2)
    if site_of(tokens).traced:
        # Strides of attention are others where the graph will run, and a view must not ask.
        tokens = tokens.clone(memory_format=torch.contiguous_format)
    return tokens.flatten(2)


def _attend(qkv: Tensor, core: WindowCore, mask: Tensor) -> Tensor:
    """Attention within windows: qkv (windows, L, 3 * C), mask (windows or 1, A, L, L)."""
    query, key, value = qkv.unflatten(2, (3, core.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if core.pairs is not None:
        mask = mask + core.pairs(query)
    return join_heads(attend_pairs(query, key, value, mask, core.scale, core.dropout, core.drop))


def attend_pairs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    drop: nn.Module | None = None,
) -> Tensor:
    """Attention of heads of queries (B, A, T, D) to keys and values (B, A, K, D): (B, A, T, D).

    The mask is added to the logits; ``drop`` is a module that is to see the attention weights, in
    place of ``dropout``.
    """
    if drop is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    logits = query * scale @ key.transpose(-1, -2)
    return drop((logits if mask is None else logits + mask).softmax(dim=-1)) @ value


def _attend_dense(filled: Tensor, core: WindowCore, layout: WindowLayout, batch: int) -> Tensor:
    if not len(layout.regions):
        return _attend(filled, core, core.bias)
    inner = (len(layout.token_ids) - len(layout.regions)) * batch
    regions = _per_image(region_mask(layout, core.bias.dtype, core.apart), batch)
    parts = [_attend(filled[inner:], core, core.bias + regions)]
    if len(layout.token_ids) > len(layout.regions):
        parts.insert(0, _attend(filled[:inner], core, core.bias))
    return torch.cat(parts)


def _active_mask(
    core: WindowCore, layout: WindowLayout, rows: Tensor, batch: int, summarised: bool
) -> Tensor:
    """Bias of all windows with idle keys and other regions masked: (M * B, A, L, L).

    With summaries (M * B, A, L + 1, L + 1): the last key is hidden where no token is idle.
    """
    bias, (windows, slots) = core.bias, layout.token_ids.shape
    inside = _per_image(layout.token_ids >= 0, batch)
    keys = hide(inside.flatten(), bias.dtype).index_fill(0, rows, 0.0).view(windows * batch, slots)
    mask = bias + keys[:, None, None]
    if len(layout.regions):
        regions = region_mask(layout, bias.dtype, core.apart)
        mask[-len(layout.regions) * batch :] += _per_image(regions, batch)
    if summarised:
        mask = F.pad(mask, (0, 1, 0, 1))
        nothing_idle = (keys == 0.0).all(dim=1)
        if core.hides_padding:
            # A summary is of no region.
            keys = keys + hide(~inside, bias.dtype)
        mask[..., -1, :-1] += keys[:, None]
        mask[..., -1] += hide(nothing_idle, bias.dtype)[:, None, None]
    return mask


def _per_image(table: Tensor, batch: int) -> Tensor:
    """What holds for windows (M, ...) for those of a batch: (M * B, ...), images vary fastest."""
    # Not repeat_interleave, whose ONNX fails for a batch of any size.
    return table[:, None].expand(-1, batch, *table.shape[1:]).flatten(0, 1)


def _regions_of(layout: WindowLayout, windows: Tensor, core: WindowCore) -> Tensor:
    """Region mask of the given windows (B, K): (B * K, 1, L, L); zero inside the map."""
    inner = len(layout.token_ids) - len(layout.regions)
    regions = F.pad(region_mask(layout, core.bias.dtype, core.apart), (0, 0, 0, 0, 0, 0, 1, 0))
    return regions[(windows.flatten() - (inner - 1)).clamp(min=0)]
