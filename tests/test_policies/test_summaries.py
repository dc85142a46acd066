"""EViT's fused and Evo-ViT's representative tokens, against naive loops over windows and tokens."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import assert_close, image, stage_blocks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_cases import BY_CASE

from idlevit_mm.blocks import Carried, Tokens, weighted_mean
from idlevit_mm.kernels import use_backend
from idlevit_mm.layers import SelfAttention, attention
from idlevit_mm.ops import row_mask

DOUBLE = torch.float64


def tokens(block, hw, batch=2, seed=5):
    channels = block.policy.scorer.embed_dims
    count = hw[0] * hw[1] + block.num_class
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, channels, generator=generator, dtype=DOUBLE)


def run_planned(block, x, hw, keep):
    """Output of a block with all rows in their places, and what it hands on."""
    out, carried = block(x, hw, keep)
    return block.settled(Tokens(out, hw, carried.pack)), carried


def windows_of(hw, window, shift):
    """For each window the token in each slot (-1 for padding) and its region, as mmdet rolls."""
    h, w = hw
    hp, wp = -(-h // window) * window, -(-w // window) * window
    grid = torch.full((hp, wp), -1)
    grid[:h, :w] = torch.arange(h * w).view(h, w)
    region = torch.zeros(hp, wp, dtype=torch.long)
    if shift:
        grid = torch.roll(grid, (-shift, -shift), (0, 1))
        cuts = [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
        for i, rows in enumerate(cuts):
            for j, cols in enumerate(cuts):
                region[rows, cols] = 3 * i + j
    for top in range(0, hp, window):
        for left in range(0, wp, window):
            part = slice(top, top + window), slice(left, left + window)
            yield grid[part].flatten().tolist(), region[part].flatten()


def softmax_attention(qkv, heads, scale, bias, visible):
    """(T, 3C) to (T, C) for one window; bias (A, T, T), visible (T, T)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in qkv.chunk(3, -1))
    logits = (q @ k.transpose(-2, -1) * scale + bias).masked_fill(~visible, float('-inf'))
    return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


def naive_swin(block, x, hw, active, weights, spreads):
    """One image (N, C): every window by itself, with a summary of its idle tokens if it has any."""
    msa = block.attn.w_msa
    window, slots = block.attn.window_size, block.attn.window_size**2
    table = msa.relative_position_bias_table[msa.relative_position_index.flatten()]
    table = table.view(slots, slots, -1).permute(2, 0, 1)
    out, bare = x.clone(), x.clone()

    def finish(token, attended):
        y = token + F.linear(attended, msa.proj.weight, msa.proj.bias)
        return block.ffn(block.norm2(y), identity=y)

    for slot_tokens, region in windows_of(hw, window, block.attn.shift_size):
        real = [(s, t) for s, t in enumerate(slot_tokens) if t >= 0]
        idle = [t for _, t in real if not active[t]]
        seen = [s for s, t in enumerate(slot_tokens) if t < 0 or active[t]]
        rows = [
            block.norm1(x[slot_tokens[s]]) if slot_tokens[s] >= 0 else torch.zeros_like(x[0])
            for s in seen
        ]
        bias = table[:, seen][:, :, seen]
        visible = region[seen][:, None] == region[seen][None]
        if idle:
            share = weights[idle] / weights[idle].sum()
            summary = sum(a * x[t] for a, t in zip(share, idle, strict=True))
            rows.append(block.norm1(summary))
            bias, visible = F.pad(bias, (0, 1, 0, 1)), F.pad(visible, (0, 1, 0, 1), value=True)
        attended = softmax_attention(
            msa.qkv(torch.stack(rows)), msa.num_heads, msa.scale, bias, visible
        )
        for row, s in enumerate(seen):
            if slot_tokens[s] >= 0:
                out[slot_tokens[s]] = finish(bare[slot_tokens[s]], attended[row])
        if idle and spreads:
            added = finish(summary, attended[-1]) - summary
            for t in idle:
                out[t] = x[t] + added
    return out


@pytest.mark.parametrize('backend', ['cpu', 'reference'])
@pytest.mark.parametrize('name', ['swin-evit', 'swin-evovit'])
@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(1, 13), st.integers(1, 13), st.booleans(), st.floats(0.01, 0.99))
@example(8, 8, True, 0.6)
@example(9, 11, True, 0.15)
@example(1, 6, True, 0.6)
@example(3, 13, False, 0.15)
@torch.no_grad()
def test_swin_equals_loop_over_windows(name, backend, height, width, shifted, keep):
    model, hw = swin_of(name), (height, width)
    block = stage_blocks(model)[0][int(shifted)]
    x = tokens(block, hw)
    with use_backend(backend):
        out, (_, plan, *_) = run_planned(block, x, hw, keep)
    active = row_mask(plan.rows, height * width)
    weights = torch.zeros(active.shape) if plan.summary is None else plan.summary
    assert (plan.summary is None) == active.all()
    for i in range(len(x)):
        want = naive_swin(block, x[i], hw, active[i], weights[i], name == 'swin-evovit')
        assert_close(out[i], want, 1e-10)


@cache
def swin_of(name):
    return BY_CASE[name].build().double()


def test_weighted_mean_without_weight_is_zero():
    x = torch.randn(1, 2, 3, 4)
    weights = torch.tensor([[[0.0, 0.0, 0.0], [1e-38, 0.0, 3e-38]]])
    mean = weighted_mean(x, weights)
    assert torch.equal(mean[0, 0], torch.zeros(4))
    assert_close(mean[0, 1], 0.25 * x[0, 1, 0] + 0.75 * x[0, 1, 2], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', ['vit-no-cls-evit', 'vit-no-cls-evovit', 'vit-evovit-norm'])
def test_summary_in_plain_vit_is_one_token_more(name):
    """The dense block on the active tokens and the mean of the idle ones, made by hand."""
    model = BY_CASE[name].build().double()
    block = stage_blocks(model)[0][1]
    hw, p = (5, 7), block.num_class
    x = tokens(block, hw)
    out, (_, plan, *_) = run_planned(block, x, hw, 0.4)
    for i in range(2):
        ids = plan.rows.ids[i]
        idle = torch.ones(35, dtype=torch.bool).index_fill(0, ids, False)
        w = plan.summary[i][idle]
        mean = (w[:, None] * x[i, :35][idle]).sum(0) / w.sum()
        # A dense block on a map of one row, whose last token is the mean; then the class token.
        sequence = torch.cat([x[i, ids], mean[None], x[i, 35:]])[None]
        after = block(sequence, (1, len(ids) + 1), 1.0)[0][0]
        count = len(ids)
        assert_close(out[i, ids], after[:count], 1e-11)
        assert_close(out[i, 35:], after[count + 1 :], 1e-11)
        assert out[i, 35:].shape[0] == p
        added = after[count] - mean if 'evovit' in name else torch.zeros_like(mean)
        assert_close(out[i, :35][idle], x[i, :35][idle] + added, 1e-11)


@torch.no_grad()
@pytest.mark.parametrize('name', ['pvt-evovit', 'pvtv2-evovit'])
def test_representative_of_pvt_is_a_query_only(name):
    """In PVT active tokens are as without it; idle ones follow it, here as the last query."""
    case = BY_CASE[name]
    model = case.build().double()
    block = stage_blocks(model)[1][-1]
    hw = (5, 7)
    x = tokens(block, hw)
    out, (_, plan, *_) = run_planned(block, x, hw, 0.4)
    plain = case.build(policy=dict(representative=False)).double()
    want = stage_blocks(plain)[1][-1](x, hw, 0.4)[0]
    active = row_mask(plan.rows, 35)
    # In PVTv2 it stands in the places of idle tokens, which the convolution sees.
    assert torch.allclose(out[active], want[active], rtol=0, atol=1e-12) == (name == 'pvt-evovit')
    attn = block.attn.attn
    c = x.shape[-1]
    for i in range(2):
        w = plan.summary[i]
        assert ((w > 0) == ~active[i]).all()
        mean = (w / w.sum()) @ x[i]
        context = block.attn.reduce(block.norm1(x[i : i + 1]), hw)[0]
        projected = F.linear(context, attn.in_proj_weight[c:], attn.in_proj_bias[c:])
        query = F.linear(block.norm1(mean), attn.in_proj_weight[:c], attn.in_proj_bias[:c])
        heads, size = block.attn.num_heads, c // block.attn.num_heads
        result = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            key, value = projected[:, :c][:, part], projected[:, c:][:, part]
            result.append((key @ query[part] * size**-0.5).softmax(0) @ value)
        y = mean + attn.out_proj(torch.cat(result))
        # A map of the same token everywhere: what stands for its neighbours is like it.
        constant = block.norm2(y).expand(1, 25, -1)
        y = y + block.ffn(constant, (5, 5), None)[0, 12]
        assert_close(out[i][~active[i]], x[i][~active[i]] + (y - mean), 1e-11)


# --- EViT: who is in play ----------------------------------------------------------------------


@torch.no_grad()
def test_evit_computes_class_attention_only_where_tokens_leave(monkeypatch):
    model, rows, whole = BY_CASE['vit-evit'].build(), [], attention.row_attention
    monkeypatch.setattr(
        attention, 'row_attention', lambda *args: rows.append(whole(*args)) or rows[-1]
    )
    model.set_keep_ratios(1.0)
    model(image((1, 3, 45, 58)))
    assert not rows
    model.set_keep_ratios([[0.6] + [1.0] * (model.depths[0] - 1)])
    model(image((1, 3, 45, 58)))
    assert len(rows) == 1


@torch.no_grad()
@pytest.mark.parametrize('bias', [True, False])
def test_folded_query_scores_as_keys_do(bias):
    attn = SelfAttention(12, 3, qkv_bias=bias).double()
    for parameter in attn.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 9, 12, dtype=DOUBLE)
    scores, keys = attn.class_query(x, 8, with_keys=True)
    folded, nothing = attn.class_query(x, 8, with_keys=False)
    assert nothing is None
    assert_close(keys, attn.project(x, 1, 2), 1e-13)
    assert_close(folded, scores, 1e-12)
    query = attn.project(x[:, 8], 0, 1).unflatten(-1, (3, 4))
    by_hand = torch.einsum('bad,bsad->bs', query, keys.unflatten(-1, (3, 4))) / 3
    assert_close(scores, by_hand, 1e-12)


@pytest.mark.parametrize('context', ['active', 'all'])
def test_keys_are_shared_only_in_full_precision(context):
    model = BY_CASE['vit-idlevit-map'].build(0.5, policy=dict(context=context))
    block, hw = stage_blocks(model)[0][0], (5, 7)
    x = Tokens(tokens(block, hw).float(), hw)
    _, scores, keys = block.look(x, 0.5, Carried())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        _, others, nothing = block.look(x, 0.5, Carried())
    assert keys.shape == x.x.shape
    assert nothing is None
    plans = [block.planned(x, each, 0.5, Carried())[0] for each in (scores, others)]
    assert torch.equal(plans[0].rows.ids, plans[1].rows.ids)
