"""Attention with decomposed relative positions on packed tokens (ViTDet, arXiv 2203.16527).

Shape letters: B images or windows, H and W of the map or of a window, N = H * W, T computed rows, K
keys, R summaries of idle tokens, C channels, A heads, D channels of a head, P places of a table.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.drop import build_dropout
from torch import Tensor, nn

from ..kernels import attend_pairs, backend_at, exact, join_heads, split_heads
from ..ops import Rows
from .share import kept_share
from .window_attention import WindowAttention


class RelativeAttention(WindowAttention):
    """Attention within windows, or among all computed rows, with one relative table for each axis.

    Idle tokens are no keys. Padding of windows is a key as in the dense block: it is zero after the
    norm. Summaries of idle tokens have no place, and so no position bias.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        window_size: Side of a window in tokens; 0 for the whole map.
        table_shape: Height and width in tokens that tables of the whole map are for; they are
            resized to each map.
        use_rel_pos: Whether there are tables.
        drop_path_rate: Stochastic depth of the branch.
        **kwargs: Further arguments of ``WindowAttention``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        table_shape: tuple[int, int],
        use_rel_pos: bool = True,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dims, num_heads, window_size, **kwargs)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            sides = (window_size, window_size) if window_size else table_shape
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * side - 1, embed_dims // num_heads)) for side in sides
            )
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def pairs(self, hw_shape: tuple[int, int]) -> Callable[..., Tensor] | None:
        if not self.use_rel_pos:
            return None
        tables = (
            resize_axis_table(table, side)
            for table, side in zip((self.rel_pos_h, self.rel_pos_w), hw_shape, strict=True)
        )
        return partial(relative_bias, tables=tuple(tables))

    def fold_table(self, hw_shape: tuple[int, int]) -> None:
        """Resize the tables of the whole map for good."""
        if self.use_rel_pos and not self.window_size:
            for name, side in zip(('rel_pos_h', 'rel_pos_w'), hw_shape, strict=True):
                table = resize_axis_table(getattr(self, name), side).detach()
                setattr(self, name, nn.Parameter(table.clone()))

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        rows: Rows | None = None,
        context: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Compute the branch, without the identity; see ``ShiftWindowMSA.forward``.

        Behind tokens of the whole map there may be summaries (B, T + R, C), without a place in it.
        """
        if self.window_size:
            return self.drop(super().forward(x, hw_shape, rows, context, padding))
        if context is None:
            parts = self.project(x, 0, 3).chunk(3, dim=-1)
        else:
            parts = self.project(x, 0, 1), *self.project(context, 1, 3).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        ids, backend = None if rows is None else rows.ids, backend_at(x)
        # Keys are the rows that are computed, or all of the map in their order.
        some_keys = context is None or context.shape[1] < hw_shape[0] * hw_shape[1]
        pairs, known = self.pairs(hw_shape), ids if some_keys else None
        # Logits of all queries at once would go through main memory.
        pieces = backend.channel_parts(query.shape[2], key[..., 0].numel(), self.training)
        if ids is None and len(pieces) > 1:
            ids = torch.arange(query.shape[2], device=x.device)[None]
        outs = []
        for piece in pieces:
            some, mask = query[:, :, piece], None
            if pairs is not None:
                mask = pairs(some, ids=None if ids is None else ids[:, piece], key_ids=known)
                if key.shape[2] > mask.shape[3] or some.shape[2] > mask.shape[2]:  # a summary
                    more = key.shape[2] - mask.shape[3], some.shape[2] - mask.shape[2]
                    mask = F.pad(mask, (0, more[0], 0, more[1]))
            outs.append(attend_pairs(some, key, value, mask, self.scale, *self.dropping()))
        out = join_heads(torch.cat(outs, dim=2))
        return self.drop(self.proj_drop(backend.linear(out, self.proj)))

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        """Share of attention as in ``IdleBlock.kept_share``, of normalised tokens."""
        if self.window_size:
            return super().kept_share(x, hw_shape, mask)
        query, key = self.project(x, 0, 2).chunk(2, dim=-1)
        pairs, bias = self.pairs(hw_shape), None
        if pairs is not None:
            bias = pairs(split_heads(query, self.num_heads).mean(dim=1))
        return kept_share(query, key, mask, self.scale / self.num_heads, bias)


def resize_axis_table(table: Tensor, side: int) -> Tensor:
    """Interpolate the table of an axis (P, D) linearly to that of ``side`` tokens."""
    if len(table) == 2 * side - 1:
        return table
    grid = exact(table).t()[None]
    return F.interpolate(grid, size=2 * side - 1, mode='linear')[0].t().to(table.dtype)


def relative_bias(
    query: Tensor,
    tables: tuple[Tensor, Tensor],
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """Add to the logits what tables say of the steps from keys to queries along both axes.

    Args:
        query: (..., T, D), unscaled; rows beyond those of the map have no place.
        tables: (2 * H - 1, D) and (2 * W - 1, D).
        ids: (B, T), places of the queries (B, A, T, D); None where all N are there in order.
        key_ids: (B, K), places of the keys; None where all are.

    Returns:
        (..., T, K) without rows that have no place; in windows, whose rows are as many as their
        keys, with zeros for them.
    """
    height, width = ((len(table) + 1) // 2 for table in tables)
    if ids is not None:
        query = query[..., : ids.shape[1], :]
        if key_ids is not None:
            by_row = _steps(query, tables[0], ids // width, key_ids // width)
            return by_row + _steps(query, tables[1], ids % width, key_ids % width)
        sides = (torch.arange(side, device=ids.device)[None] for side in (height, width))
        places = ids // width, ids % width
        by_row, by_col = map(_steps, (query, query), tables, places, sides)
        return (by_row[..., :, None] + by_col[..., None, :]).flatten(-2)
    grid = query[..., : height * width, :].unflatten(-2, (height, width))
    # Sliding is a view, and unlike indexing its backward is deterministic.
    rows, cols = (table.unfold(0, (len(table) + 1) // 2, 1).flip(-1) for table in tables)
    by_row = torch.einsum('...yxd,ydk->...yxk', grid, rows)
    by_col = torch.einsum('...yxd,xdk->...yxk', grid, cols)
    bias = (by_row[..., :, None] + by_col[..., None, :]).flatten(-2).flatten(-3, -2)
    extra = query.shape[-2] - height * width
    return F.pad(bias, (0, extra, 0, extra)) if extra else bias


def _steps(query: Tensor, table: Tensor, places: Tensor, key_places: Tensor) -> Tensor:
    """Of one axis, by places of queries (B, T) and keys (B, K): (B, A, T, K)."""
    steps = places[:, :, None] - key_places[:, None] + len(table) // 2
    known = torch.einsum('batd,pd->batp', query, table)
    return known.gather(-1, steps[:, None].expand(*known.shape[:-1], -1))
