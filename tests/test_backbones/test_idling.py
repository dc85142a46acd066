"""Below 1.0: who is active, that idle rows pass unchanged, and that the work shrinks."""

import math
from itertools import combinations, cycle

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    DETERMINISTIC_SCORERS,
    FAMILIES,
    SCORERS,
    BlockTrace,
    all_equal,
    assert_close,
    image,
    kept,
    parametrize,
    randomize,
    stage_blocks,
    variant_scopes,
    window_ids,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SCOPES = variant_scopes(FAMILIES)
# Scorers do not know families: each scope with one of them, and each of them once.
SCOPES_AND_SCORERS = [
    *(pytest.param(*p.values, 'mean_distance', id=f'{p.id}-mean_distance') for p in SCOPES),
    *(
        pytest.param(variant, 'map', scorer, id=f'{variant.name}-{scorer}')
        for variant, scorer in zip(FAMILIES, cycle(SCORERS), strict=False)
        if scorer != 'mean_distance'
    ),
    *(
        pytest.param(BY_NAME[n], 'map', 'mean_query', id=f'{n}-mean_query')
        for n in ('vit', 'vitdet')
    ),
]


def build(variant, scope='map', scorer='mean_distance', keep=0.5, seed=0, **kwargs):
    policy = dict(scorer=scorer, scope=scope)
    return randomize(variant.build(keep_ratios=keep, policy=policy, **kwargs), seed).eval()


def assert_exact_count(mask, keep, scope, window, shift):
    """``mask`` (B, H, W) holds as many active units as the scope and the ratio say."""
    _, h, w = mask.shape
    if scope == 'map':
        assert mask.flatten(1).sum(1).tolist() == [kept(keep, h * w)] * len(mask)
        return
    ids = window_ids((h, w), window, shift)
    windows = ids.unique().tolist()
    for one in mask:
        active = [(int(one[ids == i].sum()), int((ids == i).sum())) for i in windows]
        if scope == 'window_tokens':
            assert [a for a, _ in active] == [kept(keep, size) for _, size in active]
        else:
            assert all(a in (0, size) for a, size in active), 'a window is partly active'
            assert sum(a > 0 for a, _ in active) == kept(keep, len(windows))


def assert_idles_properly(variant, model, trace, scope, every_row_moves=True):
    masks = model.keep_masks
    blocks = stage_blocks(model)
    assert [len(stage) for stage in masks] == [len(stage) for stage in blocks]
    window = variant.kwargs.get('window_size', 1)
    for s, stage in enumerate(masks):
        for b, mask in enumerate(stage):
            x, out, (h, w) = trace.calls[s][b]
            assert mask.dtype == torch.bool
            assert mask.shape == (len(x), h, w)
            assert not mask.requires_grad
            shift = window // 2 if b % 2 else 0
            assert_exact_count(mask, model.keep_ratios[s][b], scope, window, shift)
            flat = mask.flatten(1)
            assert torch.equal(out[~flat], x[~flat]), f'stage {s} block {b}: idle rows changed'
            moved = (out[flat] != x[flat]).any(-1) | (not every_row_moves)
            assert moved.all(), f'stage {s} block {b}: {int((~moved).sum())} active rows unchanged'
            assert out.isfinite().all()


@pytest.mark.parametrize(('variant', 'scope', 'scorer'), SCOPES_AND_SCORERS)
def test_idle_rows_are_untouched_and_counts_exact(variant, scope, scorer):
    """By a ratio for each block, at extremes and on the smallest maps, and in training too."""
    choices = cycle([0.7, 1.0, 0.3, 0.6, 0.25])
    ratios = [[next(choices) for _ in range(depth)] for depth in variant.depths]
    dropping = dict(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.4)
    model = build(variant, scope, scorer, **dropping)
    for keep in (ratios, 0.5, 0.999, 1e-6):
        model.set_keep_ratios(keep)
        for size in variant.sizes:
            with BlockTrace(model) as trace, torch.no_grad():
                model(image(size))
            assert_idles_properly(variant, model, trace, scope)
    model.set_keep_ratios(ratios)
    model.train()
    with BlockTrace(model) as trace:
        outs = model(image((4, 3, 45, 50)))
    assert_idles_properly(variant, model, trace, scope, every_row_moves=False)
    assert not all_equal(outs, model(image((4, 3, 45, 50)))), 'nothing is dropped'


@torch.no_grad()
@parametrize()
def test_no_two_scorers_choose_the_same_tokens(variant):
    masks = []
    for scorer in ('random', *DETERMINISTIC_SCORERS):
        model = build(variant, scorer=scorer, keep=0.4)
        model(image((1, 3, 64, 80)))
        masks.append(model.keep_masks[0][0])
    for one, other in combinations(masks, 2):
        assert (one & other).sum() < 0.99 * one.sum()
    assert all((masks[0] & mask).sum() < 0.7 * mask.sum() for mask in masks[1:])


def test_random_scorer_draws_anew():
    model = build(BY_NAME['swin'], scorer='random')
    with torch.no_grad():
        model(image((2, 3, 64, 80)))
        first = model.keep_masks[0][0]
        assert not torch.equal(first[0], first[1]), 'both images got the same tokens'
        model(image((2, 3, 64, 80)))
        assert not torch.equal(first, model.keep_masks[0][0]), 'two forwards got the same tokens'
        torch.manual_seed(5)
        model(image((2, 3, 64, 80)))
        second = model.keep_masks[0][0]
        torch.manual_seed(5)
        model(image((2, 3, 64, 80)))
    assert torch.equal(second, model.keep_masks[0][0])


@pytest.mark.parametrize(
    ('name', 'scorer', 'precision'),
    [
        ('swin', 'mean_distance', torch.float32),
        ('swin', 'activation_norm', torch.bfloat16),
        ('pvt', 'mean_distance', torch.bfloat16),
        ('pvtv2', 'activation_norm', torch.float16),
        ('mit', 'activation_norm', torch.float32),
        ('vit', 'mean_distance', torch.float16),
        ('vit', 'activation_norm', torch.bfloat16),
    ],
)
def test_highest_scores_are_active(name, scorer, precision):
    """Scores of the map as it enters the block, in single precision under autocast too."""
    model = build(BY_NAME[name], scorer=scorer, keep=0.4)
    autocast = torch.autocast('cpu', precision, enabled=precision != torch.float32)
    with BlockTrace(model) as trace, torch.no_grad(), autocast:
        model(image((1, 3, 160, 160)))
    for s, stage in enumerate(model.keep_masks):
        for b, mask in enumerate(stage):
            x = trace.calls[s][b][0].double()
            scores = x.abs().mean(-1)
            if scorer == 'mean_distance':
                scores = (x - x.mean(1, keepdim=True)).norm(dim=-1)
            mask = mask.flatten(1)
            # Single precision errs by about 1e-7, half precision by 1e-3.
            assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-5)


# --- the mathematics, against a reference that computes everything and masks -------------------


def linear(x, params, name):
    return torch.nn.functional.linear(
        x, params[f'{name}.weight'].flatten(1), params.get(f'{name}.bias')
    )


def norm(x, params, name, eps):
    weight = params[f'{name}.weight']
    return torch.nn.functional.layer_norm(x, weight.shape, weight, params[f'{name}.bias'], eps)


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def reference_swin_block(block, x, mask, hw, heads, window, shift):
    """Every token computed; an idle token is no key and keeps its old row."""
    params = dict(block.named_parameters())
    (h, w), c = hw, x.shape[-1]
    assert h % window == w % window == 0
    msa = 'attn.w_msa.' if hasattr(block.attn, 'w_msa') else 'attn.'
    is_second = f'{msa}logit_scale' in params  # version, whose norms come last
    qkv = linear(x if is_second else norm(x, params, 'norm1', 1e-5), params, f'{msa}qkv')
    if is_second:
        biases = params[f'{msa}q_bias'], torch.zeros(c), params[f'{msa}v_bias']
        qkv = qkv + torch.cat(biases)
    q, k, v = (heads_of(t, heads) for t in qkv.chunk(3, -1))
    rows = torch.arange(h).repeat_interleave(w)
    cols = torch.arange(w).repeat(h)
    ids = window_ids(hw, window, shift).flatten()
    same_window = ids[:, None] == ids[None, :]
    # Tokens that only the cyclic shift brought side by side do not see each other.
    near = torch.ones_like(same_window)
    for place, length in ((rows, h), (cols, w)):
        rolled = (place - shift) % length
        near &= (place[:, None] - place) == (rolled[:, None] - rolled)
    if is_second:
        hidden = linear(block.attn.w_msa.relative_coords_table, params, f'{msa}cpb_mlp.0').relu()
        table = 16 * linear(hidden, params, f'{msa}cpb_mlp.2').sigmoid().view(-1, heads)
    else:
        no_table = torch.zeros((2 * window - 1) ** 2, heads, dtype=x.dtype)
        table = params.get(f'{msa}relative_position_bias_table', no_table)
    dr = (rows[:, None] - rows).clamp(1 - window, window - 1) + window - 1
    dc = (cols[:, None] - cols).clamp(1 - window, window - 1) + window - 1
    bias = table[dr * (2 * window - 1) + dc].permute(2, 0, 1)
    scale = (c // heads) ** -0.5
    if is_second:
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        scale = params[f'{msa}logit_scale'].exp().clamp(max=100)
    logits = q @ k.transpose(-2, -1) * scale + bias
    # An active query always sees itself, so that no active row is empty; idle rows are not used.
    visible = (same_window & near) & mask.flatten(1)[:, None, None, :]
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
    branch = linear((weights @ v).transpose(1, 2).flatten(2), params, f'{msa}proj')
    y = x + (norm(branch, params, 'norm1', 1e-5) if is_second else branch)
    normed = y if is_second else norm(y, params, 'norm2', 1e-5)
    hidden = torch.nn.functional.gelu(linear(normed, params, 'ffn.layers.0.0'))
    branch = linear(hidden, params, 'ffn.layers.1')
    y = y + (norm(branch, params, 'norm2', 1e-5) if is_second else branch)
    if 'norm3.weight' in params:
        y = norm(y, params, 'norm3', 1e-5)
    return torch.where(mask.flatten(1)[..., None], y, x)


@pytest.mark.usefixtures('each_window_path')
@pytest.mark.parametrize('scope', ['map', 'window_tokens', 'windows'])
@pytest.mark.parametrize(
    ('name', 'scorer'),
    [('swin', 'mean_distance'), ('swin-w7', 'random'), ('swinv2-norm3', 'mean_query')],
)
def test_swin_equals_masked_reference(name, scope, scorer):
    variant = BY_NAME[name]
    window = variant.kwargs['window_size']
    model = build(variant, scope, scorer).double()
    size = (2, 3, 8 * window, 16 * window)
    with BlockTrace(model) as trace, torch.no_grad():
        model(image(size, dtype=torch.float64))
        for s, stage in enumerate(model.keep_masks):
            for b, mask in enumerate(stage):
                x, out, hw = trace.calls[s][b]
                block = stage_blocks(model)[s][b]
                heads = variant.kwargs['num_heads'][s]
                shift = window // 2 if b % 2 else 0
                want = reference_swin_block(block, x, mask, hw, heads, window, shift)
                assert_close(out, want, 1e-9, f'stage {s} block {b}')


def reference_pvt_block(block, x, mask, hw, heads, reduction, conv_ffn, eps=1e-6):
    """Queries from every token, keys from the reduced whole map; idle rows restored at the end."""
    params = dict(block.named_parameters())
    b, n, c = x.shape
    normed = norm(x, params, 'norm1', eps)
    source = normed
    if reduction > 1:
        grid = normed.transpose(1, 2).reshape(b, c, *hw)
        grid = torch.nn.functional.conv2d(
            grid, params['attn.sr.weight'], params['attn.sr.bias'], stride=reduction
        )
        source = norm(grid.flatten(2).transpose(1, 2), params, 'attn.norm', eps)
    wq, wk, wv = params['attn.attn.in_proj_weight'].chunk(3)
    bq, bk, bv = params['attn.attn.in_proj_bias'].chunk(3)
    q, k, v = (
        heads_of(t @ weight.T + bias, heads)
        for t, weight, bias in ((normed, wq, bq), (source, wk, bk), (source, wv, bv))
    )
    weights = (q @ k.transpose(-2, -1) * (c // heads) ** -0.5).softmax(-1)
    y = x + linear((weights @ v).transpose(1, 2).flatten(2), params, 'attn.attn.out_proj')
    first, last = 'ffn.layers.0', 'ffn.layers.4' if conv_ffn else 'ffn.layers.3'
    if f'{first}.0.weight' in params:
        first, last = 'ffn.layers.0.0', 'ffn.layers.1'
    hidden = linear(norm(y, params, 'norm2', eps), params, first)
    if conv_ffn:
        # Idle tokens have no hidden features in this block: zero in the neighbourhood of others.
        hidden = hidden * mask.flatten(1)[..., None]
        weight = params['ffn.layers.1.weight']
        canvas = hidden.transpose(1, 2).reshape(b, -1, *hw)
        canvas = torch.nn.functional.conv2d(
            canvas, weight, params['ffn.layers.1.bias'], padding=1, groups=weight.shape[0]
        )
        hidden = canvas.flatten(2).transpose(1, 2)
    hidden = torch.nn.functional.gelu(hidden)
    y = y + linear(hidden, params, last)
    return torch.where(mask.flatten(1)[..., None], y, x)


@pytest.mark.parametrize('name', ['pvt', 'pvtv2', 'mit'])
@pytest.mark.parametrize(
    ('scorer', 'size'), [('mean_distance', (2, 3, 64, 80)), ('random', (1, 3, 97, 131))]
)
def test_pvt_equals_masked_reference(name, scorer, size):
    variant = BY_NAME[name]
    model = build(variant, scorer=scorer).double()
    with BlockTrace(model) as trace, torch.no_grad():
        model(image(size, dtype=torch.float64))
        for s, stage in enumerate(model.keep_masks):
            for b, mask in enumerate(stage):
                x, out, hw = trace.calls[s][b]
                want = reference_pvt_block(
                    stage_blocks(model)[s][b],
                    x,
                    mask,
                    hw,
                    heads=variant.kwargs['num_heads'][s],
                    reduction=variant.kwargs['sr_ratios'][s],
                    conv_ffn=name != 'pvt',
                )
                assert_close(out, want, 1e-9, f'stage {s} block {b}')


@pytest.mark.usefixtures('each_window_path')
@pytest.mark.parametrize('name', ['pcpvt', 'svt'])
def test_twins_equal_masked_reference(name):
    """And positions are encoded after the first block of a stage, for idle tokens too."""
    variant = BY_NAME[name]
    model = build(variant).double()
    with BlockTrace(model) as trace, torch.no_grad():
        model(image((2, 3, 96, 192), dtype=torch.float64))
        for s, stage in enumerate(model.keep_masks):
            heads = variant.kwargs['num_heads'][s]
            for b, mask in enumerate(stage):
                x, out, hw = trace.calls[s][b]
                block = stage_blocks(model)[s][b]
                if name == 'svt' and b % 2 == 0:
                    window = variant.kwargs['windiow_sizes'][s]
                    want = reference_swin_block(block, x, mask, hw, heads, window, 0)
                else:
                    reduction = variant.kwargs['sr_ratios'][s]
                    want = reference_pvt_block(block, x, mask, hw, heads, reduction, False, 1e-5)
                assert_close(out, want, 1e-9, f'stage {s} block {b}')
            (_, out, hw), (x, _, _) = trace.calls[s][:2]
            grid = out.transpose(1, 2).unflatten(2, hw)
            conv = model.position_encodings[s].proj
            assert_close(x, out + conv(grid).flatten(2).transpose(1, 2), 1e-12)


# --- work ------------------------------------------------------------------------------------


def block_flops(model, x, train):
    """Multiply-adds of all blocks, forward (and backward), by operator."""
    model.train(train)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.set_grad_enabled(train):
        outs = model(x)
        if train:
            sum(out.square().sum() for out in outs).backward()
    return {str(op): n for op, n in counter.get_flop_counts()['Global'].items()}


def linear_operations(count):
    """Operations of linear layers and convolutions; products in batches are those of attention."""
    return sum(n for name, n in count.items() if name not in ('aten.bmm', 'aten.baddbmm'))


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_work_shrinks(variant, scope):
    """At half the tokens the token-wise products (not attention) halve, and all shrink.

    Counted on a map without padding, by operator, as the difference of dense and idle, so that
    what lies outside the blocks drops out.
    """
    options = variant.wide(16)
    x = image((1, 3, 128, 128))
    for train in (False, True):
        full, half = (
            block_flops(build(variant, scope, keep=k, **options), x, train) for k in (1.0, 0.5)
        )
        assert sum(half.values()) < sum(full.values())
        saved = linear_operations(full) - linear_operations(half)
        # Forward and both products of backward: three times the forward operations.
        expected = 0.5 * token_wise_flops(variant, options, (128, 128)) * (3 if train else 1)
        assert saved >= 0.97 * expected, f'saved {saved}, expected {expected}'


def token_wise_flops(variant, options, size):
    """Operations (2 per multiply-add) of the linear layers that run on active tokens only."""
    kwargs = {**variant.kwargs, **options}
    total = 0
    tokens = [size[0] * size[1] // 4 ** (2 + s) for s in range(4)]
    for s, n in enumerate(tokens[: len(variant.depths)]):
        if variant.is_plain:
            c, depth = kwargs['embed_dims'], kwargs['num_layers']
            per_token = (4 + 2 * kwargs['mlp_ratio']) * c * c  # qkv, projection, MLP
        elif variant.is_swin:
            c, depth = kwargs['embed_dims'] * 2**s, kwargs['depths'][s]
            per_token = 12 * c * c  # qkv, projection, MLP
        else:
            c, depth = kwargs['embed_dims'], variant.depths[s]
            c = c[s] if variant.is_twins else c * kwargs['num_heads'][s]
            mlp = kwargs['mlp_ratios'][s] if 'mlp_ratios' in kwargs else kwargs['mlp_ratio']
            per_token = (2 + 2 * mlp) * c * c  # query, projection, MLP
        total += 2 * depth * n * per_token
    return total


def test_core_of_swin_by_windows_shrinks_too():
    """Whole idle windows are left out of attention as well."""
    x = image((1, 3, 128, 128))
    swin = BY_NAME['swin']
    full, half = (block_flops(build(swin, 'windows', keep=k), x, False) for k in (1.0, 0.5))
    core = [sum(n for op, n in counts.items() if 'bmm' in op) for counts in (full, half)]
    assert core[0] > 0
    assert core[1] <= 0.55 * core[0]


@parametrize()
def test_scoring_is_cheap(variant):
    """No scorer spends on the whole map what idling saves."""
    x = image((1, 3, 128, 128))
    counts = {
        scorer: sum(block_flops(build(variant, scorer=scorer), x, False).values())
        for scorer in SCORERS
    }
    for scorer, count in counts.items():
        assert count <= 1.1 * counts['random'], f'{scorer}: {count}, random: {counts["random"]}'


# --- batches, determinism, gradients ---------------------------------------------------------


# MiT's blocks are PVTv2's, which has more of them, and SVT has those of PCPVT; Swin V2's gradients
# are held against others'.
@pytest.mark.parametrize(
    ('variant', 'scope'),
    [p for p in SCOPES if p.values[0].name not in ('pvtv2', 'pcpvt', 'svt', 'swinv2')],
)
def test_gradients_are_right(variant, scope):
    """Numerical against analytical gradients; the grid keeps the selection fixed."""
    options = variant.wide(4)
    if variant.is_swin:
        options.update(window_size=2, num_heads=(1, 2), mlp_ratio=1)
    model = build(variant, scope, 'uniform_grid', **options).double()
    x = image((1, 3, 21, 25), dtype=torch.float64)
    names = [n for n, _ in model.named_parameters()]
    params = tuple(p.detach().clone().requires_grad_() for p in model.parameters())

    def forward(x, *values):
        outs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return tuple(outs)

    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *params), fast_mode=True)
