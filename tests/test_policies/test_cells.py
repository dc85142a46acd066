"""Summaries of cells: each idle token follows that of its own square of the map."""

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import assert_close, image, stage_blocks
from policy_cases import BY_CASE
from torch.autograd import gradcheck

from idlevit_mm.kernels import use_backend
from idlevit_mm.layers import MixFFN
from idlevit_mm.ops import Rows, row_mask, window_layout

HW, SIDE = (5, 7), 3
CPU = torch.device('cpu')


def cells_of(hw, side):
    """Tokens of each cell, cells row by row."""
    height, width = hw
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows = range(top, min(top + side, height))
            cols = range(left, min(left + side, width))
            yield [row * width + col for row in rows for col in cols]


def naive_ffn(ffn, x, active, owner, summaries, hw):
    """PVTv2's network of one image: active tokens (N, C), where idle ones are their cell's."""
    first, conv, act, _, second, _ = ffn.layers
    hidden = F.linear(torch.where(active[:, None], x, summaries[owner]), first.weight.flatten(1))
    hidden = (hidden + first.bias).t().view(1, -1, *hw)
    out = F.conv2d(hidden, conv.weight, conv.bias, padding=1, groups=len(conv.weight))
    out = act(out).flatten(2)[0].t()
    return F.linear(out, second.weight.flatten(1), second.bias)


@torch.no_grad()
@pytest.mark.parametrize('backend', ['cpu', 'reference'])
@pytest.mark.parametrize('name', ['pvt-evovit', 'pvtv2-evovit'])
def test_block_equals_loop_over_cells(name, backend):
    model = BY_CASE[name].build(policy=dict(summary_size=SIDE)).double()
    block = stage_blocks(model)[1][-1]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 35, block.embed_dims, generator=generator, dtype=torch.float64)
    if backend == 'cpu':  # its kernels are for float32
        block, x = block.float(), x.float()
    with use_backend(backend):
        out, (_, plan, *_) = block(x, HW, 0.4)
    block, x, out = block.double(), x.double(), out.double()
    cells, active = list(cells_of(HW, SIDE)), row_mask(plan.rows, 35)
    owner = torch.empty(35, dtype=torch.long)
    for number, cell in enumerate(cells):
        owner[cell] = number
    for i in range(3):
        weights = plan.summary[i].double()
        means = torch.stack([weights[cell] @ x[i, cell] for cell in cells])
        means /= torch.stack([weights[cell].sum() for cell in cells]).clamp(min=1e-30)[:, None]
        context = block.norm1(x[i : i + 1])
        after = means + block.attn(block.norm1(means)[None], context, HW)[0]
        now = x[i] + block.attn(context, context, HW)[0]
        normed = block.norm2(after)
        if 'v2' in name:
            branch = naive_ffn(block.ffn, block.norm2(now), active[i], owner, normed, HW)
            # What stands for all its neighbours is convolved as if they were like it.
            alike = normed[:, None].expand(-1, 9, -1)
            changed = torch.stack([block.ffn(one[None], (3, 3), None)[0, 4] for one in alike])
        else:
            branch, changed = (block.ffn(y[None], HW, None)[0] for y in (block.norm2(now), normed))
        added = after + changed - means
        want = torch.where(active[i][:, None], now + branch, x[i] + added[owner])
        assert_close(out[i], want, 1e-5 if backend == 'cpu' else 1e-11)


@torch.no_grad()
@pytest.mark.parametrize('name', ['pvtv2-evovit', 'pvtv2-idlevit-summary', 'svt-evovit'])
def test_a_cell_of_the_whole_map_is_one_summary_of_it(name):
    x = image((2, 3, 45, 58), dtype=torch.float64)
    outs = [
        BY_CASE[name].build(policy=dict(summary_size=side)).double()(x) for side in (None, 64, 2)
    ]
    for one, whole, _ in zip(*outs, strict=True):
        assert_close(whole, one, 1e-11)
    assert not torch.allclose(outs[2][-1], outs[0][-1])


@torch.no_grad()
@pytest.mark.parametrize('name', ['vit-evovit-norm', 'vit-no-cls-evovit', 'vitdet-evovit'])
def test_summaries_of_cells_are_queries_alone_among_all_tokens(name):
    block, plain = (
        next(
            block
            for block in stage_blocks(BY_CASE[name].build(policy=policy).double())[0]
            if not getattr(block.attn, 'window_size', 0)
        )
        for policy in (dict(summary_size=SIDE), dict(representative=False))
    )
    generator = torch.Generator().manual_seed(5)
    count = 35 + block.num_class
    x = torch.randn(3, count, block.embed_dims, generator=generator, dtype=torch.float64)
    (out, (_, plan, *_)), (want, *_) = block(x, HW, 0.4), plain(x, HW, 0.4)
    active = row_mask(plan.rows, 35)
    # As no key changes, neither do active tokens.
    computed = F.pad(active, (0, block.num_class), value=True)
    assert_close(out[computed], want[computed], 1e-11)
    for i in range(3):
        for cell in cells_of(HW, SIDE):
            idle = [token for token in cell if not active[i, token]]
            if idle:
                weights = plan.summary[i, idle] / plan.summary[i, idle].sum()
                mean = weights @ x[i, idle]
                # What it attends to: the rows that are computed, and itself not.
                rows = x[i, computed[i]]
                added = (out[i, idle] - x[i, idle])[0]
                assert_close(out[i, idle], x[i, idle] + added, 1e-11)
                if 'vitdet' not in name:
                    assert_close(added, _changed(block, mean, rows), 1e-11)


def _changed(block, mean, rows):
    """What a block of a plain ViT adds to a token that attends to some rows (T, C)."""
    attn, heads = block.attn.attn, block.attn.num_heads
    query, key, value = (
        F.linear(block.ln1(own), attn.in_proj_weight[part], attn.in_proj_bias[part])
        for own, part in zip(
            (mean[None], rows, rows),
            (slice(i * len(mean), (i + 1) * len(mean)) for i in range(3)),
            strict=True,
        )
    )
    query, key, value = (
        part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (query, key, value)
    )
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    out = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
    now = mean + block.residual_scale * block.attn.gamma1(attn.out_proj(out))[0]
    return now + block.residual_scale * block.ffn(block.ln2(now)) - mean


def test_gradients_of_a_convolution_among_summaries():
    torch.manual_seed(0)
    ffn = MixFFN(2, 3, dict(type='GELU'), use_conv=True).double()
    rows = Rows(torch.tensor([[0, 3, 4], [1, 2, 5]]))
    cells = window_layout(2, 3, 2, 0, CPU).window_ids
    x = torch.randn(2, 3 + 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: ffn(x, (2, 3), rows, cells), (x, *ffn.parameters()))


@pytest.mark.parametrize(
    ('name', 'side', 'message'),
    [
        ('pvt-evovit', 0, 'policy.summary_size=0 must be a side in tokens'),
        ('pvt-evovit', True, 'policy.summary_size=True must be a side in tokens'),
        ('swin-evovit', 4, 'summary_size=4: each window of this backbone has a summary already'),
    ],
)
def test_wrong_sizes(name, side, message):
    with pytest.raises(ValueError, match=message):
        BY_CASE[name].build(policy=dict(summary_size=side))
