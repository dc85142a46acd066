"""Window attention on packed tokens.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels, A heads, M windows, L slots of a window (window_size ** 2), E border windows.
"""

from typing import Any

import torch
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
from .window_slots import (
    WindowCore,
    attend_slots,
    attend_whole_windows,
    hide,
    region_mask,
)
from .window_squeezed import attend_squeezed

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
            # In half precision the fused operation on all slots is faster.
            and qkv.dtype in (torch.float32, torch.float64)
            and not autocasts('cpu')
            and not (self.training and self.attn_drop.p > 0)
        )

    def core(self) -> WindowCore:
        """What attention within windows needs beside queries, keys and values."""
        bias = self.qkv.bias
        # Padding is zero after the norm.
        blank = self.qkv.weight.new_zeros(len(self.qkv.weight)) if bias is None else bias
        dropout = self.attn_drop.p if self.training else 0.0
        return WindowCore(self.position_bias(), blank, self.num_heads, self.scale, dropout)


class ShiftWindowMSA(BaseModule):
    """Window attention of the active tokens of a map.

    Projections run on the packed active tokens. The core runs on windows squeezed to their active
    tokens where the number of these may decide about shapes, otherwise on all slots of all windows.

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
        if selection is not None and context is not None:
            qkv = self._project_queries(x, context, selection)
            out = take_tokens(self._attend(qkv, hw_shape, None), selection)
        else:
            out = self._attend(self.w_msa.qkv(x), hw_shape, selection, whole)
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

    def _attend(
        self,
        qkv: Tensor,
        hw_shape: tuple[int, int],
        selection: Selection | None,
        whole: bool = False,
    ) -> Tensor:
        """Attention of packed tokens, and of summaries behind them: (B, T + R, C)."""
        core = self.w_msa.core()
        if self.w_msa.squeezes(qkv):
            packing = self._packing(qkv, hw_shape, selection, whole)
            return attend_squeezed(qkv, core, packing)
        layout = window_layout(*hw_shape, self.window_size, self.shift_size, qkv.device)
        if selection is not None and whole:
            return attend_whole_windows(qkv, core, layout, selection)
        return attend_slots(qkv, core, layout, None if selection is None else selection.token_ids)

    def _packing(
        self, qkv: Tensor, hw_shape: tuple[int, int], selection: Selection | None, whole: bool
    ) -> WindowPacking:
        windows = hw_shape, self.window_size, self.shift_size
        if selection is not None and whole:
            return pack_whole_windows(selection.unit_ids, *windows)
        batch, rows, _ = qkv.shape
        if selection is None:
            return pack_windows(None, batch, *windows)
        return pack_windows(
            selection.token_ids,
            batch,
            *windows,
            summarised=rows > selection.token_ids.shape[1],
            min_places=_MIN_PLACES // self.num_heads,
        )


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
