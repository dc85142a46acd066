"""Window attention on packed tokens.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels, A heads, M windows, L slots of a window (window_size ** 2).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from mmcv.cnn.bricks.drop import build_dropout
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from ..kernels import LINEAR, WindowCore, backend_at, hide, is_plain, region_mask
from ..ops import Rows, WindowLayout, window_layout
from .attention import Projections
from .share import kept_share


class WindowAttention(Projections, BaseModule):
    """Attention within windows for packed tokens; heirs say what positions add to the logits.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        window_size: Side of a window in tokens.
        qkv_bias: Whether query, key and value have a bias.
        qk_scale: Factor of the logits; None means ``D ** -0.5``.
        attn_drop_rate: Dropout of the attention weights.
        proj_drop_rate: Dropout of the output.
    """

    # Cyclic shift of the windows in tokens.
    shift_size = 0
    # As in ``WindowCore``.
    apart: float | None = None

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
        self._add_tables(embed_dims // num_heads)
        self.qkv = nn.Linear(embed_dims, embed_dims * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def _add_tables(self, head_dims: int) -> None:
        """Add the parameters of positions, in the place that optimizers know them by."""

    def position_bias(self, x: Tensor) -> Tensor:
        """What is added to the logits of all slot pairs: (1, A, L, L), on the device of x."""
        return x.new_zeros(()).expand(1, self.num_heads, *(self.window_size**2,) * 2)

    def pairs(self, hw_shape: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
        """What is added besides and depends on queries; see ``WindowCore``."""
        return None

    def hides_padding(self, hw_shape: tuple[int, int]) -> bool:
        """Whether padding of a map is no key."""
        return False

    def shift_at(self, hw_shape: tuple[int, int]) -> int:
        """Cyclic shift of the windows on a map of this size."""
        return self.shift_size

    def windows(self, hw_shape: tuple[int, int], device: torch.device) -> WindowLayout:
        """How the windows lie on a map."""
        hidden = (True,) * self.hides_padding(hw_shape)
        shift = self.shift_at(hw_shape)
        return window_layout(*hw_shape, self.window_size, shift, *hidden, device)

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        rows: Rows | None = None,
        context: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Compute the branch, without the identity; see ``ShiftWindowMSA.forward``."""
        core, backend = self.core(x, hw_shape, padding), backend_at(x)
        shift_size = self.shift_at(hw_shape)
        if rows is not None and context is not None:
            qkv = self._project_queries(x, context, rows)
            out = backend.attend_windows(qkv, core, hw_shape, shift_size, None)
            out = backend.take(out, rows)
        else:
            qkv = self.projected(x)
            out = backend.attend_windows(qkv, core, hw_shape, shift_size, rows)
        return self.proj_drop(backend.linear(out, self.proj))

    def projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values of tokens (B, T, C): (B, T, 3 * C)."""
        return backend_at(x).linear(x, self.qkv)

    def core(
        self, x: Tensor, hw_shape: tuple[int, int], padding: Tensor | None = None
    ) -> WindowCore:
        """What attention within windows needs beside queries, keys and values."""
        blank = self._blank(x, hw_shape) if padding is None else self.project(padding, 0, 3)
        sizes = self.window_size, self.num_heads, self.scale
        return WindowCore(
            self.position_bias(x),
            blank,
            *sizes,
            *self.dropping(),
            pairs=self.pairs((self.window_size, self.window_size)),
            hides_padding=self.hides_padding(hw_shape),
            apart=self.apart,
        )

    def dropping(self) -> tuple[float, nn.Module | None]:
        """Dropout of the attention weights, and the module in its place if that is no plain one."""
        plain = is_plain(self.attn_drop, nn.Dropout)
        return (
            self.attn_drop.p if plain and self.training else 0.0,
            None if plain else self.attn_drop,
        )

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """Share of attention in windows as in ``IdleBlock.kept_share``, of normalised tokens.

        Logits are those of the dense block: position bias added, other regions hidden. Padding
        slots are neither keys nor rows, since padding is neither active nor idle.
        """
        layout = self.windows(hw_shape, x.device)
        query, key = _fill_slots(self.project(x, 0, 2), layout).chunk(2, dim=-1)
        share = kept_share(
            query,
            key,
            _fill_slots(mask.reshape(*mask.shape[:2], -1), layout),
            self.scale / self.num_heads,
            self._mean_bias(layout, query),
        )
        return share.flatten(1, 2).index_select(1, layout.slot_ids).view(mask.shape)

    def _mean_bias(self, layout: WindowLayout, query: Tensor) -> Tensor:
        """Head mean of the bias, padding keys and other regions hidden: (M, L, L) or per image."""
        padding, dtype = layout.token_ids < 0, query.dtype
        bias = self.position_bias(query).mean(dim=1).to(dtype) + hide(padding, dtype)[:, None]
        inner = len(bias) - len(layout.regions)
        regions = region_mask(layout, dtype, self.apart)[:, 0]
        bias = torch.cat([bias[:inner], bias[inner:] + regions])
        pairs = self.pairs((self.window_size, self.window_size))
        if pairs is None:
            return bias
        # Linear in the query: the mean over heads is that of the mean query.
        mean = query.unflatten(-1, (self.num_heads, -1)).mean(dim=-2)
        return bias + pairs(mean)

    def weights(self) -> tuple[Tensor, Tensor | None] | None:
        plain = is_plain(self.qkv, *LINEAR)
        return (self.qkv.weight, self.qkv.bias) if plain else None

    def _blank(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Query, key and value of padding, which is zero after the norm: (3 * C,)."""
        weights = self.weights()
        if weights is None:
            padded = any(side % self.window_size for side in hw_shape)
            zero = x.new_zeros(1, 1, x.shape[-1])
            return self.called(zero).flatten() if padded else zero.expand(3, -1, -1).flatten()
        weight, bias = weights
        return weight.new_zeros(len(weight)) if bias is None else bias

    def _project_queries(self, x: Tensor, context: Tensor, rows: Rows) -> Tensor:
        """Keys and values of the whole map, queries of the active tokens: (B, N, 3 * C)."""
        key_value = self.project(context, 1, 3)
        query = self.project(x, 0, 1)
        # What stands in the places of idle queries is computed and thrown away.
        blank = torch.zeros_like(key_value[..., : x.shape[-1]])
        return torch.cat([backend_at(x).put(blank, rows, query), key_value], dim=-1)


class WindowMSA(WindowAttention):
    """Window attention with relative position bias (arXiv 2103.14030), for packed tokens.

    Buffers follow from the window alone: those of a checkpoint are not looked at.
    """

    def _add_tables(self, head_dims: int) -> None:
        places = (2 * self.window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(places, self.num_heads))
        self.register_buffer('relative_position_index', relative_position_index(self.window_size))

    def init_weights(self) -> None:
        """Draw the bias table from a truncated normal distribution."""
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias_table(self) -> Tensor:
        """Bias of each step from one slot to another: ((2 * window_size - 1) ** 2, A)."""
        return self.relative_position_bias_table

    def position_bias(self, x: Tensor) -> Tensor:
        """Relative position bias of all slot pairs: (1, A, L, L)."""
        # The same as indexing the table by relative_position_index, whose rows are sliding windows
        # over the table. Sliding is a view, and unlike indexing its backward is deterministic.
        side = self.window_size
        table = self.bias_table().view(2 * side - 1, 2 * side - 1, -1)
        pairs = table.unfold(0, side, 1).unfold(1, side, 1).flip(-1, -2)
        return pairs.permute(2, 0, 1, 3, 4).reshape(1, -1, side * side, side * side)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        own = self.named_buffers(recurse=False)
        state_dict |= {f'{prefix}{name}': buffer for name, buffer in own}
        super()._load_from_state_dict(state_dict, prefix, *args)


class LocallyGroupedAttention(WindowAttention):
    """Window attention of Twins-SVT (arXiv 2104.13840), without shift and without position bias.

    mmseg hides padding as a key where a map is padded both at the bottom and at the right; where it
    is padded at one side, padding is seen as in Swin.

    Args:
        *args: Those of ``WindowAttention``, as are further keyword arguments.
        drop_path_rate: Stochastic depth of the branch.
    """

    def __init__(self, *args: Any, drop_path_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def hides_padding(self, hw_shape: tuple[int, int]) -> bool:
        return all(side % self.window_size for side in hw_shape)

    def forward(self, *args: Any) -> Tensor:
        """Compute the branch, without the identity; see ``ShiftWindowMSA.forward``."""
        return self.drop(super().forward(*args))


class ShiftWindowMSA(BaseModule):
    """Window attention of the active tokens of a map.

    Projections run on the packed active tokens, the core on windows by the backend's way.

    Padding slots are never active. As keys they are seen as in the dense block, where the map is
    padded after the norm so that their key and value are the biases: an idle block then tends to
    the dense one as the keep ratio goes to 1.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        window_size: Side of a window in tokens.
        shift_size: Cyclic shift of the windows in tokens; 0 for a regular partition.
        drop_path_rate: Stochastic depth of the branch.
        **kwargs: Further arguments of ``CORE``.
    """

    CORE: ClassVar[type[WindowAttention]] = WindowMSA

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
        self.w_msa = self.CORE(embed_dims, num_heads, window_size, **kwargs)
        self.w_msa.shift_size = shift_size
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        rows: Rows | None,
        context: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Compute the branch, without the identity.

        Args:
            x: (B, T, C), the normalised active tokens; all N of them where ``rows`` is None.
                (B, T + M, C) with a summary of its idle tokens for each window of the layout: a
                slot more without position bias, hidden as a key where no token is idle.
            hw_shape: (H, W).
            rows: Which tokens of the map are active, maybe whole windows.
            context: (B, N, C), the normalised map, if idle tokens serve as keys and values too.
            padding: (C,), what stands for padding among normalised tokens; None for zeros.
        """
        return self.drop(self.w_msa(x, hw_shape, rows, context, padding))

    def windows(self, hw_shape: tuple[int, int], device: torch.device) -> WindowLayout:
        """How the windows lie on a map."""
        return self.w_msa.windows(hw_shape, device)

    def shift_at(self, hw_shape: tuple[int, int]) -> int:
        """Cyclic shift of the windows on a map of this size."""
        return self.w_msa.shift_at(hw_shape)

    def mean_query_attention(self, *args: Any) -> Tensor:
        """See ``Projections.mean_query_attention``."""
        return self.w_msa.mean_query_attention(*args)

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """See ``WindowAttention.kept_share``."""
        return self.w_msa.kept_share(x, hw_shape, mask)


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
