"""Window attention on packed tokens.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels, A heads, M windows, L slots of a window (window_size ** 2), E border windows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.drop import build_dropout
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from ..ops import (
    Selection,
    WindowLayout,
    WindowPacking,
    autocasts,
    eager_on_cpu,
    pack_whole_windows,
    pack_windows,
    put_tokens,
    take_tokens,
    window_layout,
)
from .attention import mean_query_attention
from .linear import Linear, linear
from .share import kept_share
from .window_core import attend_squeezed

# Slots of all heads for which launching the operations of a bucket of windows pays.
_MIN_PLACES = 2**11


class WindowMSA(BaseModule):
    """Parameters and core of window attention with relative position bias (arXiv 2103.14030).

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        window_size: Side of a window in tokens.
        qkv_bias: Whether query, key and value have a bias.
        qk_scale: Factor of the logits; None means ``D ** -0.5``.
        attn_drop_rate: Dropout of the attention weights.
        proj_drop_rate: Dropout of the output.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = qk_scale or (embed_dims // num_heads) ** -0.5
        places = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(places, num_heads))
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self.qkv = Linear(embed_dims, embed_dims * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def init_weights(self) -> None:
        """Draw the bias table from a truncated normal distribution."""
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_bias(self) -> Tensor:
        """Relative position bias of all slot pairs: (1, A, L, L)."""
        # The same as indexing the table by relative_position_index, whose rows are sliding windows
        # over the table. Sliding is a view, and unlike indexing its backward is deterministic.
        side = self.window_size
        table = self.relative_position_bias_table.view(2 * side - 1, 2 * side - 1, -1)
        pairs = table.unfold(0, side, 1).unfold(1, side, 1).flip(-1, -2)
        return pairs.permute(2, 0, 1, 3, 4).reshape(1, -1, side * side, side * side)

    def squeezes(self, qkv: Tensor) -> bool:
        """Whether windows are squeezed to their occupied slots, whose number the data decide."""
        return (
            eager_on_cpu(qkv)
            and qkv.dtype in (torch.float32, torch.float64)
            and not autocasts('cpu')
            and not (self.training and self.attn_drop.p > 0)
        )

    def attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """Attention within whole windows.

        Args:
            qkv: (windows, L, 3 * C).
            mask: (windows or 1, A, L, L), added to the logits.

        Returns:
            (windows, L, C).
        """
        windows, slots, _ = qkv.shape
        qkv = qkv.view(windows, slots, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask.to(qkv.dtype),
            dropout_p=dropout,
            scale=self.scale,
        )
        return out.transpose(1, 2).reshape(windows, slots, -1)


class ShiftWindowMSA(BaseModule):
    """Window attention of the active tokens of a map.

    Projections run on the packed active tokens. The core runs on whole windows: the packed tokens
    are written to their slots, idle slots are masked as keys, and the active slots are read back.

    Padding slots are never active. As keys they are seen as in the dense block, where the map is
    padded after the norm so that their key and value are the biases: an idle block then tends to
    the dense one as the keep ratio goes to 1.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        window_size: Side of a window in tokens.
        shift_size: Cyclic shift of the windows in tokens; 0 for a regular partition.
        drop_path_rate: Stochastic depth of the branch.
        **kwargs: Further arguments of ``WindowMSA``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.num_heads = num_heads
        self.w_msa = WindowMSA(embed_dims, num_heads, window_size, **kwargs)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        selection: Selection | None,
        whole: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        """Compute the branch, without the identity.

        Args:
            x: (B, T, C), the normalised active tokens; all N of them where ``selection`` is None.
                (B, T + M, C) with a summary of its idle tokens for each window of the layout: a
                slot more without position bias, hidden as a key where no token is idle.
            hw_shape: Height and width of the map in tokens.
            selection: Which tokens of the map are active.
            whole: Whether the units of the selection are whole windows.
            context: (B, N, C), the normalised map, if idle tokens serve as keys and values too.
        """
        layout = window_layout(*hw_shape, self.window_size, self.shift_size, x.device)
        if selection is not None and context is not None:
            qkv = self._project_queries(x, context, selection)
            out = take_tokens(self._attend_map(qkv, hw_shape, layout, None), selection)
        elif selection is not None and whole:
            out = self._attend_windows(self.w_msa.qkv(x), hw_shape, layout, selection)
        else:
            out = self._attend_map(self.w_msa.qkv(x), hw_shape, layout, selection)
        return self.drop(self.w_msa.proj_drop(self.w_msa.proj(out)))

    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean of the tokens x (B, N, C) to each of them: (B, A, N)."""
        weight, bias = self.w_msa.qkv.weight, self.w_msa.qkv.bias
        return mean_query_attention(x, weight, bias, self.w_msa.num_heads, self.w_msa.scale)

    def _project_queries(self, x: Tensor, context: Tensor, selection: Selection) -> Tensor:
        """Keys and values of the whole map, queries of the active tokens: (B, N, 3 * C)."""
        channels = x.shape[-1]
        weight, bias = self.w_msa.qkv.weight, self.w_msa.qkv.bias
        biases = (None, None) if bias is None else bias.split((channels, 2 * channels))
        key_value = linear(context, weight[channels:], biases[1])
        query = linear(x, weight[:channels], biases[0])
        # What stands in the places of idle queries is computed and thrown away.
        blank = torch.zeros_like(key_value[..., :channels])
        return torch.cat([put_tokens(blank, selection, query), key_value], dim=-1)

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """Share of each token's attention that goes to active tokens of its window.

        Logits are those of the dense block: position bias added, other regions hidden. Padding
        slots are neither keys nor rows, since padding is neither active nor idle.

        Args:
            x: (B, N, C), normalised tokens.
            hw_shape: Height and width of the map in tokens.
            mask: (B, N), or (B, N, V) for V masks at once; 1 for active tokens.

        Returns:
            Of the shape of ``mask``.
        """
        layout = window_layout(*hw_shape, self.window_size, self.shift_size, x.device)
        qkv, channels = self.w_msa.qkv, 2 * x.shape[-1]
        bias = None if qkv.bias is None else qkv.bias[:channels]
        query, key = _fill_slots(linear(x, qkv.weight[:channels], bias), layout).chunk(2, dim=-1)
        share = kept_share(
            query,
            key,
            _fill_slots(mask.reshape(*mask.shape[:2], -1), layout),
            self.w_msa.scale / self.w_msa.num_heads,
            self._mean_bias(layout, query.dtype),
        )
        return share.flatten(1, 2).index_select(1, layout.slot_ids).view(mask.shape)

    def _mean_bias(self, layout: WindowLayout, dtype: torch.dtype) -> Tensor:
        """Head mean of the position bias, padding keys and other regions hidden: (M, L, L)."""
        padding = layout.token_ids == len(layout.slot_ids)
        bias = self.w_msa.position_bias().mean(dim=1).to(dtype) + hide(padding, dtype)[:, None]
        inner = len(bias) - len(layout.regions)
        return torch.cat([bias[:inner], bias[inner:] + region_mask(layout, dtype)[:, 0]])

    def _attend_map(
        self,
        qkv: Tensor,
        hw_shape: tuple[int, int],
        layout: WindowLayout,
        selection: Selection | None,
    ) -> Tensor:
        """Attention of packed tokens, and of summaries behind them: (B, T + R, C)."""
        token_ids = None if selection is None else selection.token_ids
        if not self.w_msa.squeezes(qkv):
            return self._attend_slots(qkv, layout, token_ids)
        num_tokens = len(layout.slot_ids) if token_ids is None else token_ids.shape[1]
        windows = hw_shape, self.window_size, self.shift_size
        summarised = qkv.shape[1] > num_tokens
        packing = pack_windows(
            token_ids,
            len(qkv),
            *windows,
            summarised=summarised,
            min_places=_MIN_PLACES // self.num_heads,
        )
        return self._attend_packing(qkv, packing)

    def _attend_packing(self, qkv: Tensor, packing: WindowPacking) -> Tensor:
        bias = self.w_msa.position_bias()[0].to(qkv.dtype)
        out = attend_squeezed(
            qkv.flatten(0, 1),
            self._blank(qkv).expand(qkv.shape[2]),
            bias,
            packing,
            self.num_heads,
            self.w_msa.scale,
        )
        return out.unflatten(0, qkv.shape[:2])

    def _attend_slots(self, qkv: Tensor, layout: WindowLayout, token_ids: Tensor | None) -> Tensor:
        """Write packed rows to all slots of all windows, attend, read them back.

        Every shape follows from that of the arguments, as torch.compile and CUDA graphs need it.
        """
        batch, _, channels = qkv.shape
        windows, slots = layout.token_ids.shape
        places = layout.slot_ids if token_ids is None else layout.slot_ids[token_ids]
        # Images vary fastest among windows, so that the border windows of a batch are one slice.
        image = torch.arange(batch, device=qkv.device)[:, None]
        rows = ((places // slots * batch + image) * slots + places % slots).flatten()
        num_tokens = places.shape[-1]
        tokens, summaries = qkv.split_with_sizes([num_tokens, qkv.shape[1] - num_tokens], dim=1)
        blank = self._blank(qkv) if layout.has_padding else qkv.new_zeros(())
        filled = blank.expand(batch * windows * slots, channels)
        filled = filled.index_copy(0, rows, tokens.flatten(0, 1)).view(batch * windows, slots, -1)
        if token_ids is None:
            out = self._attend_dense(filled, layout, batch)
            return out.flatten(0, 1).index_select(0, rows).view(batch, -1, channels // 3)
        mask = self._active_mask(layout, rows, batch, qkv.dtype, summaries.shape[1] > 0)
        if summaries.shape[1]:
            extra = summaries.transpose(0, 1).reshape(batch * windows, 1, channels)
            filled = torch.cat([filled, extra], dim=1)
        out = self.w_msa.attend(filled, mask)
        tokens = out[:, :slots].flatten(0, 1).index_select(0, rows)
        summaries = out[:, slots:].reshape(-1, batch, channels // 3).transpose(0, 1)
        return torch.cat([tokens.view(batch, -1, channels // 3), summaries], dim=1)

    def _attend_windows(
        self, qkv: Tensor, hw_shape: tuple[int, int], layout: WindowLayout, selection: Selection
    ) -> Tensor:
        """Attend within the active windows only, which are packed already: (B, T, C)."""
        batch, num_slots, channels = qkv.shape
        slots = layout.token_ids.shape[1]
        if self.w_msa.squeezes(qkv):
            windows = hw_shape, self.window_size, self.shift_size
            return self._attend_packing(qkv, pack_whole_windows(selection.unit_ids, *windows))
        if selection.has_padding:
            padding = selection.token_ids == layout.slot_ids.shape[0]
            qkv = torch.where(padding[..., None], self._blank(qkv), qkv)
        mask = self.w_msa.position_bias().to(qkv.dtype)
        if len(layout.regions):
            mask = mask + self._regions_of(layout, selection.unit_ids, qkv.dtype)
        out = self.w_msa.attend(qkv.view(-1, slots, channels), mask)
        return out.view(batch, num_slots, -1)

    def _attend_dense(self, filled: Tensor, layout: WindowLayout, batch: int) -> Tensor:
        bias = self.w_msa.position_bias()
        borders = len(layout.regions) * batch
        if not borders:
            return self.w_msa.attend(filled, bias)
        inner = len(filled) - borders
        bordering = bias + region_mask(layout, bias.dtype).repeat_interleave(batch, dim=0)
        parts = [self.w_msa.attend(filled[inner:], bordering)]
        if inner:
            parts.insert(0, self.w_msa.attend(filled[:inner], bias))
        return torch.cat(parts)

    def _active_mask(
        self, layout: WindowLayout, rows: Tensor, batch: int, dtype: torch.dtype, summarised: bool
    ) -> Tensor:
        """Bias of all windows with idle keys and other regions masked: (M * B, A, L, L).

        With summaries (M * B, A, L + 1, L + 1): the last key is hidden where no token is idle.
        """
        windows, slots = layout.token_ids.shape
        inside = (layout.token_ids < len(layout.slot_ids)).repeat_interleave(batch, dim=0)
        keys = hide(inside.flatten(), dtype).index_fill(0, rows, 0.0).view(windows * batch, slots)
        mask = self.w_msa.position_bias().to(dtype) + keys[:, None, None]
        borders = len(layout.regions) * batch
        if borders:
            regions = region_mask(layout, dtype).repeat_interleave(batch, dim=0)
            mask[-borders:] += regions
        if summarised:
            mask = F.pad(mask, (0, 1, 0, 1))
            mask[..., -1, :-1] += keys[:, None]
            nothing_idle = (keys == 0.0).all(dim=1)
            mask[..., -1] += hide(nothing_idle, dtype)[:, None, None]
        return mask

    def _regions_of(self, layout: WindowLayout, windows: Tensor, dtype: torch.dtype) -> Tensor:
        """Region mask of the given windows (B, K): (B * K, 1, L, L); zero inside the map."""
        inner = len(layout.token_ids) - len(layout.regions)
        regions = F.pad(region_mask(layout, dtype), (0, 0, 0, 0, 0, 0, 1, 0))
        return regions[(windows.flatten() - (inner - 1)).clamp(min=0)]

    def _blank(self, qkv: Tensor) -> Tensor:
        """Query, key and value of padding, which is zero after the norm: their bias."""
        bias = self.w_msa.qkv.bias
        return qkv.new_zeros(()) if bias is None else bias.to(qkv.dtype)


def relative_position_index(window_size: int) -> Tensor:
    """Place in the bias table of each pair of slots: (L, L)."""
    axis = torch.arange(window_size)
    rows, cols = axis.repeat_interleave(window_size), axis.repeat(window_size)
    row_steps = rows[:, None] - rows[None, :] + window_size - 1
    col_steps = cols[:, None] - cols[None, :] + window_size - 1
    return row_steps * (2 * window_size - 1) + col_steps


def _fill_slots(tokens: Tensor, layout: WindowLayout) -> Tensor:
    """Write tokens (B, N, C) to the slots of all windows, zero in padding: (B, M, L, C)."""
    batch, _, channels = tokens.shape
    windows, slots = layout.token_ids.shape
    filled = tokens.new_zeros(()).expand(batch, windows * slots, channels)
    return filled.index_copy(1, layout.slot_ids, tokens).unflatten(1, (windows, slots))


def region_mask(layout: WindowLayout, dtype: torch.dtype) -> Tensor:
    """Mask of slot pairs of different regions of the border windows: (E, 1, L, L)."""
    different = layout.regions[:, :, None] != layout.regions[:, None, :]
    return hide(different, dtype)[:, None]


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: far below any logit where True, yet finite so that a hidden row is not NaN."""
    return hidden.new_zeros(hidden.shape, dtype=dtype).masked_fill(
        hidden, torch.finfo(dtype).min / 4
    )
