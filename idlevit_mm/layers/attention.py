"""Window, spatial-reduction and plain attention on packed tokens.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels, A heads, D channels of a head, M windows, L slots of a window (window_size ** 2), E
border windows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from ..ops import Selection, WindowLayout, window_layout
from .shape import pad_to, to_map, to_tokens


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
        self.qkv = nn.Linear(embed_dims, embed_dims * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = nn.Linear(embed_dims, embed_dims)
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

    def attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """Attention within windows.

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
        self, x: Tensor, hw_shape: tuple[int, int], selection: Selection | None, whole: bool = False
    ) -> Tensor:
        """Compute the branch, without the identity.

        Args:
            x: (B, T, C), the normalised active tokens; all N of them where ``selection`` is None.
                (B, T + M, C) with a summary of its idle tokens for each window of the layout: a
                slot more without position bias, hidden as a key where no token is idle.
            hw_shape: Height and width of the map in tokens.
            selection: Which tokens of the map are active.
            whole: Whether the units of the selection are whole windows.
        """
        layout = window_layout(*hw_shape, self.window_size, self.shift_size, x.device)
        qkv = self.w_msa.qkv(x)
        if selection is not None and whole:
            out = self._attend_windows(qkv, layout, selection)
        else:
            out = self._attend_map(qkv, layout, selection)
        return self.drop(self.w_msa.proj_drop(self.w_msa.proj(out)))

    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean of the tokens x (B, N, C) to each of them: (B, A, N)."""
        weight, bias = self.w_msa.qkv.weight, self.w_msa.qkv.bias
        return mean_query_attention(x, weight, bias, self.w_msa.num_heads, self.w_msa.scale)

    def _attend_map(self, qkv: Tensor, layout: WindowLayout, selection: Selection | None) -> Tensor:
        """Write packed tokens to all windows of the map, attend, read them back: (B, T + R, C)."""
        batch, _, channels = qkv.shape
        windows, slots = layout.token_ids.shape
        places = layout.slot_ids if selection is None else layout.slot_ids[selection.token_ids]
        # Images vary fastest among windows, so that the border windows of a batch are one slice.
        image = torch.arange(batch, device=qkv.device)[:, None]
        rows = ((places // slots * batch + image) * slots + places % slots).flatten()
        tokens, summaries = qkv.split_with_sizes(
            [places.shape[-1], qkv.shape[1] - places.shape[-1]], dim=1
        )
        blank = self._blank(qkv) if layout.has_padding else qkv.new_zeros(())
        filled = blank.expand(batch * windows * slots, channels)
        filled = filled.index_copy(0, rows, tokens.flatten(0, 1)).view(batch * windows, slots, -1)
        if selection is None:
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

    def _attend_windows(self, qkv: Tensor, layout: WindowLayout, selection: Selection) -> Tensor:
        """Attend within the active windows only, which are packed already: (B, T, C)."""
        batch, num_slots, channels = qkv.shape
        slots = layout.token_ids.shape[1]
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


class SpatialReductionAttention(MultiheadAttention):
    """Attention of the active tokens to the spatially reduced whole map (arXiv 2102.12122).

    Idle tokens stay visible as context: keys and values come from the whole map.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
        drop_path_rate: Stochastic depth of the branch.
        qkv_bias: Whether query, key, value and output have a bias.
        norm_cfg: Norm after the reduction.
        sr_ratio: Side of the cells, in tokens, that give one key each; 1 for no reduction.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        norm_cfg: dict | None = None,
        sr_ratio: int = 1,
    ) -> None:
        super().__init__(
            embed_dims,
            num_heads,
            attn_drop,
            proj_drop,
            dropout_layer=dict(type='DropPath', drop_prob=drop_path_rate),
            batch_first=True,
            bias=qkv_bias,
        )
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, stride=sr_ratio)
            self.norm = build_norm_layer(norm_cfg or dict(type='LN'), embed_dims)[1]

    def forward(self, queries: Tensor, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Compute the branch, without the identity.

        Args:
            queries: (B, T + R, C), the normalised active tokens and summaries.
            x: (B, N, C), the normalised map.
            hw_shape: Height and width of the map in tokens.
        """
        channels = self.embed_dims
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        query_bias, key_bias = (
            (None, None) if bias is None else bias.split((channels, 2 * channels))
        )
        query = F.linear(queries, weight[:channels], query_bias)
        key_value = F.linear(self.reduce(x, hw_shape), weight[channels:], key_bias)
        key, value = key_value.chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        dropout = self.attn.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out = self.attn.out_proj(out.transpose(1, 2).flatten(2))
        return self.dropout_layer(self.proj_drop(out))

    def reduce(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens that serve as keys: (B, N, C) to (B, cells, C).

        A map smaller than one cell, which mmdet's class refuses, is padded with zeros to one.
        """
        if self.sr_ratio == 1:
            return x
        cells = self.sr(pad_to(to_map(x, hw_shape), self.sr_ratio, self.sr_ratio))
        return self.norm(to_tokens(cells))

    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean of the tokens x (B, N, C) to each of them: (B, A, N)."""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        scale = (self.embed_dims // self.num_heads) ** -0.5
        return mean_query_attention(x, weight, bias, self.num_heads, scale)


class SelfAttention(MultiheadAttention):
    """Attention of a plain ViT among the active tokens.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
        drop_path_rate: Stochastic depth of the branch.
        qkv_bias: Whether query, key, value and output have a bias.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(
            embed_dims,
            num_heads,
            attn_drop,
            proj_drop,
            dropout_layer=dict(type='DropPath', drop_prob=drop_path_rate),
            batch_first=True,
            bias=qkv_bias,
        )

    def forward(
        self, x: Tensor, keys: Tensor | None = None, first_row: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the branch, without the identity.

        Args:
            x: (B, T, C), the normalised active tokens.
            keys: (B, T, C), their keys if they are known already.
            first_row: Whether to return the attention of the first token.

        Returns:
            (B, T, C), and if asked for the attention of the first token to all, mean over heads:
            (B, T), float32 also under autocast.
        """
        if keys is None:
            query, key, value = self.project(x, 0, 3).chunk(3, dim=-1)
        else:
            query, value = self.project(x, 0, 1), self.project(x, 2, 3)
            key = keys.to(query.dtype)
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        dropout = self.attn.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out = self.attn.out_proj(out.transpose(1, 2).flatten(2))
        row = _first_row(query, key) if first_row else None
        return self.dropout_layer(self.proj_drop(out)), row

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Queries (0), keys (1) and values (2) from ``first`` up to ``last``, one after another."""
        channels = self.embed_dims
        part = slice(first * channels, last * channels)
        bias = self.attn.in_proj_bias
        return F.linear(x, self.attn.in_proj_weight[part], None if bias is None else bias[part])

    def mean_query_attention(self, x: Tensor) -> Tensor:
        """Attention of the mean of the tokens x (B, N, C) to each of them: (B, A, N)."""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        scale = (self.embed_dims // self.num_heads) ** -0.5
        return mean_query_attention(x, weight, bias, self.num_heads, scale)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) to (B, A, T, D)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _first_row(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the first of queries and keys (B, A, T, D), mean over heads: (B, T)."""
    with torch.autocast(query.device.type, enabled=False):
        exact = torch.promote_types(query.dtype, torch.float32)
        query, key = query[:, :, :1].to(exact), key.to(exact)
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return logits.softmax(dim=-1).mean(dim=1).squeeze(1)


def relative_position_index(window_size: int) -> Tensor:
    """Place in the bias table of each pair of slots: (L, L)."""
    axis = torch.arange(window_size)
    rows, cols = axis.repeat_interleave(window_size), axis.repeat(window_size)
    row_steps = rows[:, None] - rows[None, :] + window_size - 1
    col_steps = cols[:, None] - cols[None, :] + window_size - 1
    return row_steps * (2 * window_size - 1) + col_steps


def region_mask(layout: WindowLayout, dtype: torch.dtype) -> Tensor:
    """Mask of slot pairs of different regions of the border windows: (E, 1, L, L)."""
    different = layout.regions[:, :, None] != layout.regions[:, None, :]
    return hide(different, dtype)[:, None]


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: far below any logit where True, yet finite so that a hidden row is not NaN."""
    return hidden.new_zeros(hidden.shape, dtype=dtype).masked_fill(
        hidden, torch.finfo(dtype).min / 4
    )


def mean_query_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, scale: float
) -> Tensor:
    """Softmax over tokens of the logits between the mean token's query and every token's key.

    The key projection is folded into the query, so that it costs N * C * A instead of N * C ** 2;
    the key bias adds the same to all tokens of a head and drops out of the softmax.

    Args:
        x: (B, N, C), normalised tokens.
        qkv_weight: (3 * C, C), of which queries and keys are used.
        qkv_bias: (3 * C,) or None.
        num_heads: A.
        scale: Factor of the logits.

    Returns:
        (B, A, N), each row sums to 1.
    """
    channels = x.shape[-1]
    weight = qkv_weight.to(x.dtype)
    bias = None if qkv_bias is None else qkv_bias[:channels].to(x.dtype)
    query = F.linear(x.mean(dim=1), weight[:channels], bias).unflatten(-1, (num_heads, -1))
    keys = weight[channels : 2 * channels].unflatten(0, (num_heads, -1))
    folded = torch.einsum('bad,adc->bac', query * scale, keys)
    return (folded @ x.transpose(1, 2)).softmax(dim=-1)
