"""What blocks leave to the kernels: the choice of tokens, the attention half, the MLP half.

Each function returns None for what it does not cover. Shape letters: B images, N tokens of the map
(H * W), K active tokens of an image, C channels, M windows.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import Extent, Rows, mean_inside, on_device
from ..plain import all_plain, is_plain, kind_of
from ..site import site_of
from . import ops

# Side of the tiles that rows are sorted by where there are no windows: neighbours stay close.
_TILE = 8
_HEAD_CHANNELS = 16, 32, 64, 128


def infers(x: Tensor) -> bool:
    """Whether kernels may stand for whole layers: neither gradients nor autocast are wanted."""
    site = site_of(x)
    return not (site.grad or site.autocast)


def choose(
    block: Any, tokens: Any, keep_ratio: float, extent: Extent | None
) -> tuple[Any, Rows] | None:
    """Rows that the policy IdleViT chooses, by scores that need no weights."""
    policy, kind, hw_shape = block.policy, kind_of(block), tokens.hw_shape
    scorer = kind_of(policy.scorer)
    if (
        keep_ratio == 1.0
        or kind not in _BRANCHES
        or kind_of(policy) != 'IdleViT'
        or policy.context != 'active'
        or policy.scope == 'windows'
        or (policy.scope != 'map' and extent is not None)
        or scorer not in ('MeanDistance', 'ActivationNorm')
        or not all(is_plain(part, type(part)) for part in (policy, policy.scorer))
        or tokens.pack is not None
    ):
        return None
    tokens = tokens._replace(x=tokens.x.contiguous())
    # Which are best has no gradient.
    x, norm = tokens.x.detach(), block.norm1
    mean = None
    if scorer == 'MeanDistance':
        if extent is None:
            mean = x.mean(dim=1, dtype=torch.float32)
        else:
            mean = mean_inside(x, hw_shape, extent).squeeze(1).float()
    # Spatial reduction wants the norm of all tokens.
    whole = kind == 'IdlePVTBlock' and _is_norm(norm) and infers(x)
    weights = (norm.weight, norm.bias, norm.eps) if whole else (None, None, 0.0)
    scores, *normed = ops.score_norm(x, mean, *weights)
    tokens = tokens._replace(normed=normed[0] if normed else None)
    windowed = kind == 'IdleSwinBlock'
    layout = (block.attn.window_size, block.attn.shift_size) if windowed else (_TILE, 0)
    if policy.scope == 'map':
        number = hw_shape[0] * hw_shape[1]
        if extent is not None:
            number = extent.most
            scores = torch.where(extent.inside, scores, torch.finfo(scores.dtype).min)
        count = policy.count(number, keep_ratio)
        chosen = ops.select(scores, count, hw_shape, *layout, None)
    else:
        numbers = range(1, layout[0] ** 2 + 1)
        counts = 0, *(policy.count(number, keep_ratio) for number in numbers)
        starts = _starts(hw_shape, *layout, counts, x.device)
        chosen = ops.select(scores, starts.total, hw_shape, *layout, starts.places)
    ids, offsets, places = chosen
    return tokens, Rows(ids, None, False, offsets, places)


class _Starts(NamedTuple):
    """Where the packed rows of windows begin, (M + 1,), and where those of the last end."""

    places: Any
    total: int


@on_device
def _starts(hw_shape: tuple[int, int], window: int, shift: int, counts: tuple[int, ...]) -> _Starts:
    """Of windows row by row, of which those of n tokens keep ``counts[n]``."""
    sides = []
    for side in hw_shape:
        padded = -(-side // window) * window
        inside = (np.arange(padded) + shift) % padded < side
        sides.append(inside.reshape(-1, window).sum(1))
    kept = np.array(counts)[np.outer(*sides).reshape(-1)]
    return _Starts(np.append(0, np.cumsum(kept)), int(kept.sum()))


def attention_half(
    block: Any, tokens: Any, plan: Any, keys: Tensor | None
) -> tuple[Any, None] | None:
    """Gather, norm, attention, residual, and the norm of the MLP."""
    kind, rows = kind_of(block), plan.rows
    if (
        kind not in _BRANCHES
        or not infers(tokens.x)
        or not _is_norm(block.norm2)
        or tokens.pack is not None
        or not _is_simple(plan)
        or plan.ask
        or plan.pads_first
        or (kind == 'IdleSwinBlock' and plan.keys == 'all' and rows is not None)
        or (rows is not None and rows.padded)
    ):
        return None
    tokens = tokens._replace(x=tokens.x.contiguous())
    branch = _BRANCHES[kind](block, tokens, rows)
    if branch is None:
        return None
    ids, norm = None if rows is None else rows.ids, block.norm2
    weights = norm.weight, norm.bias, norm.eps
    now, normed = ops.take_norm(tokens.x, ids, branch.contiguous(), *weights)
    return tokens.opened(now, rows, plan, normed), None


def mlp_half(block: Any, tokens: Any, plan: Any) -> Any | None:
    """MLP of the rows and its norm, if that is not there yet; residual, and the rows put back."""
    rows = plan.rows
    if kind_of(block) not in _BRANCHES or tokens.pack is None or not _is_simple(plan):
        return None
    if not infers(tokens.x):
        return None
    if rows is not None and rows.places is None:
        return None
    normed = block.norm2(tokens.now) if tokens.normed is None else tokens.normed
    branch = _mlp(block.ffn, normed, tokens.hw_shape, rows)
    if branch is None:
        return None
    if rows is None:
        return tokens.made(tokens.now + branch)
    packed = tokens.now.contiguous(), branch.contiguous()
    if not (tokens.owned and tokens.x.is_contiguous()):
        return tokens.made(ops.merge_rows(tokens.x.contiguous(), rows.places, *packed))
    ops.put_rows(tokens.x, rows.ids, *packed)
    return tokens.made(tokens.x)


def _is_simple(plan: Any) -> bool:
    """Whether nothing but rows is asked for."""
    return plan.summary is None and plan.gate is None and not (plan.hold or plan.spread)


def _is_norm(norm: nn.Module) -> bool:
    return is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def _windows(block: Any, tokens: Any, rows: Rows | None) -> Tensor | None:
    """The branch of attention in windows."""
    attn, norm = block.attn, block.norm1
    core: Any = getattr(attn, 'w_msa', None)
    if kind_of(attn) != 'ShiftWindowMSA' or kind_of(core) != 'WindowMSA':
        return None
    if not (is_plain(attn, type(attn)) and is_plain(core, type(core)) and _is_norm(norm)):
        return None
    weights, drop = core.weights(), core.attn_drop
    if (
        weights is None
        or not is_plain(drop, nn.Dropout)
        or (drop.training and drop.p > 0)
        or tokens.x.shape[2] // core.num_heads not in _HEAD_CHANNELS
        or (rows is not None and rows.offsets is None)
    ):
        return None
    ids = offsets = None
    if rows is None:
        normed = norm(tokens.x)
    else:
        ids, offsets = rows.ids, rows.offsets
        (normed,) = ops.take_norm(tokens.x, ids, None, norm.weight, norm.bias, norm.eps)
    weight, bias = weights
    blank = weight.new_zeros(len(weight)) if bias is None else bias
    layout = attn.window_size, attn.shift_size, core.num_heads, core.scale
    table = core.relative_position_bias_table
    qkv = core.qkv(normed)
    out = ops.window_attention(qkv, ids, offsets, table, blank, tokens.hw_shape, *layout)
    return attn.drop(core.proj_drop(core.proj(out)))


def _reduction(block: Any, tokens: Any, rows: Rows | None) -> Tensor | None:
    """The branch of spatial-reduction attention, whose keys come from the whole map."""
    # What hangs on another norm may hold x, which the MLP half writes to.
    if not _is_norm(block.norm1):
        return None
    queries = normed = block.norm1(tokens.x) if tokens.normed is None else tokens.normed
    if rows is not None:
        (queries,) = ops.take_norm(normed.contiguous(), rows.ids, None, None, None, 0.0)
    return block.attn(queries, normed, tokens.hw_shape)


_BRANCHES = {'IdleSwinBlock': _windows, 'IdlePVTBlock': _reduction}


def _mlp(ffn: nn.Module, x: Tensor, hw_shape: tuple[int, int], rows: Rows | None) -> Tensor | None:
    """The branch of a feed-forward network on normalised rows (B, K, C)."""
    if not all_plain(ffn):
        return None
    if kind_of(ffn) == 'FeedForward':
        if not ffn.add_identity:
            return None
        (first, act, drop), second, last_drop = ffn.layers
        out = last_drop(second(drop(act(first(x)))))
        return ffn.dropout_layer(ffn.gamma2(out))
    if kind_of(ffn) != 'MixFFN':
        return None
    first, *convolutions, act, drop, second, last_drop = ffn.layers
    hidden = F.linear(x, first.weight.flatten(1), first.bias)
    if convolutions:
        (conv,) = convolutions
        if not (
            is_plain(act, nn.GELU) and act.approximate == 'none' and conv.kernel_size == (3, 3)
        ):
            return None
        ids, places = (None, None) if rows is None else (rows.ids, rows.places)
        hidden = ops.convolve_gelu(hidden, ids, places, conv.weight, conv.bias, hw_shape)
    else:
        hidden = act(hidden)
    out = F.linear(drop(hidden), second.weight.flatten(1), second.bias)
    return ffn.dropout_layer(last_drop(out))
