"""What blocks leave to the kernels: the choice of tokens, the attention half, the MLP half.

Each function returns None for what it does not cover. Shape letters: B images, N tokens of the map
(H * W), K active tokens of an image, C channels, M windows.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...ops import Extent, Rows, mean_inside, on_device
from ..backends import backend_at
from ..plain import LINEAR, is_plain, kind_of
from . import layers, ops
from .fusions import are_idle, infers, is_norm, mlp, project, reduced, reduces, weights_of

# Side of the tiles that rows are sorted by where there are no windows: neighbours stay close.
_TILE = 8
_HEAD_CHANNELS = 16, 32, 64, 128


def choose(
    block: Any, tokens: Any, keep_ratio: float, extent: Extent | None
) -> tuple[Any, Rows] | None:
    """Rows that the policy IdleViT chooses, by scores that need no weights."""
    policy, kind, hw_shape = block.policy, kind_of(block), tokens.hw_shape
    scorer = kind_of(policy.scorer)
    if (
        policy.attending(keep_ratio) < keep_ratio
        or keep_ratio == 1.0
        or kind not in _BRANCHES
        or kind_of(policy) != 'IdleViT'
        or policy.context != 'active'
        or policy.scope == 'windows'
        or (policy.scope != 'map' and extent is not None)
        or scorer not in ('MeanDistance', 'ActivationNorm')
        or not all(is_plain(part, type(part)) for part in (policy, policy.scorer))
        or tokens.pack is not None
        or hw_shape[0] * hw_shape[1] > ops.MOST_TOKENS
    ):
        return None
    tokens = tokens._replace(x=tokens.x.contiguous())
    # Which are best has no gradient.
    x, norm = tokens.x.detach(), block.norm1
    centre = mean = changes = None
    if scorer == 'MeanDistance':
        if tokens.centre is not None:
            mean, changes = centre = tokens.centre
        elif extent is None:
            # A mean of zero that has changed by all tokens; one launch clears both.
            parts = torch.zeros(3, len(x) * x.shape[2], dtype=torch.int32, device=x.device)
            changes = parts[:2].flatten().view(torch.int64).view(len(x), -1)
            mean = parts[2].view(torch.float32).view(len(x), -1)
            centre = mean, changes
            ops.add_up(x, changes)
        else:
            mean = mean_inside(x, hw_shape, extent).squeeze(1).float()
            changes = torch.zeros_like(mean, dtype=torch.int64)
    # Spatial reduction wants the norm of all tokens.
    whole = kind == 'IdlePVTBlock' and is_norm(norm) and infers(tokens.x)
    if whole and reduces(block):
        score = 'activation' if mean is None else 'distance'
        *normed, scores = reduced(block, x, hw_shape, score, mean, changes)
    else:
        weights = weights_of(norm) if whole else (None, None, 0.0)
        scores, *normed = ops.score_norm(x, mean, changes, *weights)
    tokens = tokens._replace(normed=normed[0] if normed else None, centre=centre)
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
    """Gather, norm, attention and residual."""
    kind, rows = kind_of(block), plan.rows
    if (
        kind not in _BRANCHES
        or not infers(tokens.x)
        or tokens.pack is not None
        or not _is_simple(plan)
        or plan.ask
        or plan.pads_first
        or (kind == 'IdleSwinBlock' and plan.keys == 'all' and rows is not None)
        or (rows is not None and rows.padded)
    ):
        return None
    tokens = tokens._replace(x=tokens.x.contiguous())
    heads = _BRANCHES[kind](block, tokens, rows)
    if heads is None:
        return None
    (out, proj, *drops), ids = heads, None if rows is None else rows.ids
    if is_plain(proj, *LINEAR) and are_idle(*drops):
        weights = [part for part in (proj.weight, proj.bias) if part is not None]
        changes = None if rows is None or tokens.centre is None else tokens.centre[1]
        (now,) = layers.add_branch(tokens.x, ids, out, weights, 0.0, None, changes)
    else:
        for layer in (proj, *drops):
            out = layer(out)
        now = ops.take_norm(tokens.x, ids, out.contiguous(), None, None, 0.0)
        tokens = tokens._replace(centre=None)
    return tokens.opened(now, rows, plan), None


def mlp_half(block: Any, tokens: Any, plan: Any) -> Any | None:
    """Norm and MLP of the rows, residual, and the rows put back."""
    rows, norm = plan.rows, block.norm2
    if kind_of(block) not in _BRANCHES or tokens.pack is None or not _is_simple(plan):
        return None
    if not infers(tokens.x):
        return None
    if rows is not None and rows.places is None:
        return None
    now = tokens.now.contiguous()
    parts = mlp(norm, block.ffn, now, tokens.hw_shape, rows)
    if parts is None:
        return None
    branch, weights = parts
    if rows is not None and tokens.owned and tokens.x.is_contiguous():
        changes = None if tokens.centre is None else tokens.centre[1]
        layers.add_branch(now, rows.ids, branch, weights, norm.eps, tokens.x, changes)
        return tokens.made(tokens.x)._replace(centre=tokens.centre)
    if weights:
        (now,), branch = layers.add_branch(now, None, branch, weights, norm.eps, None, None), None
    if rows is not None:
        now = ops.merge_rows(tokens.x.contiguous(), rows.places, now, branch)
    elif branch is not None:
        now = now + branch
    return tokens.made(now)


def _is_simple(plan: Any) -> bool:
    """Whether nothing but rows is asked for."""
    return plan.summary is None and plan.gate is None and not (plan.hold or plan.spread)


def _windows(block: Any, tokens: Any, rows: Rows | None) -> tuple[Any, ...] | None:
    """Attention in windows: its heads, and the layers behind."""
    attn, norm = block.attn, block.norm1
    core: Any = getattr(attn, 'w_msa', None)
    if kind_of(attn) != 'ShiftWindowMSA' or kind_of(core) != 'WindowMSA':
        return None
    if not (is_plain(attn, type(attn)) and is_plain(core, type(core)) and is_norm(norm)):
        return None
    weights = core.weights()
    if (
        weights is None
        or not are_idle(core.attn_drop)
        or tokens.x.shape[2] // core.num_heads not in _HEAD_CHANNELS
        or (rows is not None and rows.offsets is None)
    ):
        return None
    ids, offsets = (None, None) if rows is None else (rows.ids, rows.offsets)
    weight, bias = weights
    blank = weight.new_zeros(len(weight)) if bias is None else bias
    layout = attn.window_size, attn.shift_size, core.num_heads, core.scale
    table = core.relative_position_bias_table
    qkv = project(tokens.x, ids, norm, weight, bias)
    out = ops.window_attention(qkv, ids, offsets, table, blank, tokens.hw_shape, *layout)
    return out, core.proj, core.proj_drop, attn.drop


def _reduction(block: Any, tokens: Any, rows: Rows | None) -> tuple[Any, ...] | None:
    """Spatial-reduction attention, whose keys come from the whole map, and the layers behind."""
    attn, x, norm, inner = block.attn, tokens.x, block.norm1, None
    core: Any = getattr(attn, 'attn', None)
    # What hangs on another norm may hold x, which the MLP half writes to.
    if not (is_norm(norm) and kind_of(attn) == 'SpatialReductionAttention'):
        return None
    if not (is_plain(attn, type(attn)) and is_plain(core, nn.MultiheadAttention)):
        return None
    if core.training and core.dropout:
        return None
    known = tokens.normed
    if reduces(block):
        cells, inner = known, attn.norm
        if cells is None:
            (cells,) = reduced(block, x, tokens.hw_shape)
    else:
        x, norm = backend_at(x).norm(x, norm) if known is None else known, None
        cells = attn.reduce(x, tokens.hw_shape)
    (weight, bias), channels = attn.weights(), x.shape[2]
    first, others = (None, None) if bias is None else (bias[:channels], bias[channels:])
    query = project(x, None if rows is None else rows.ids, norm, weight[:channels], first)
    key, value = project(cells, None, inner, weight[channels:], others).chunk(2, dim=-1)
    out = backend_at(x).attend(query, key, value, attn.num_heads)
    return out, core.out_proj, attn.proj_drop, attn.dropout_layer


_BRANCHES = {'IdleSwinBlock': _windows, 'IdlePVTBlock': _reduction}
