"""Below 1.0: who is active, that idle rows pass unchanged, and that the work shrinks."""

import math
from itertools import cycle, pairwise

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    DETERMINISTIC_SCORERS,
    FAMILIES,
    SCORERS,
    BlockTrace,
    assert_close,
    assert_same_gradients,
    gradients,
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


def assert_idles_properly(variant, model, trace, keep, scope):
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
            assert_exact_count(mask, keep, scope, window, shift)
            flat = mask.flatten(1)
            assert torch.equal(out[~flat], x[~flat]), f'stage {s} block {b}: idle rows changed'
            moved = (out[flat] != x[flat]).any(-1)
            assert moved.all(), f'stage {s} block {b}: {int((~moved).sum())} active rows unchanged'
            assert out.isfinite().all()


@pytest.mark.parametrize(('variant', 'scope', 'scorer'), SCOPES_AND_SCORERS)
def test_idle_rows_are_untouched_and_counts_exact(variant, scope, scorer):
    for keep in (0.7, 0.3):
        model = build(variant, scope, scorer, keep)
        for size in variant.sizes[:3]:
            with BlockTrace(model) as trace, torch.no_grad():
                model(image(size))
            assert_idles_properly(variant, model, trace, keep, scope)


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_extreme_ratios_and_smallest_maps(variant, scope):
    for keep in (0.5, 0.999, 1e-6):
        model = build(variant, scope, keep=keep)
        for size in variant.sizes[2:]:
            with BlockTrace(model) as trace:
                outs = model(image(size))
            assert all(out.isfinite().all() for out in outs)
            assert_idles_properly(variant, model, trace, keep, scope)


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_idles_in_training_too(variant, scope):
    """Dropout and drop path never reach idle rows."""
    model = build(variant, scope, drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.4)
    model.train()
    with BlockTrace(model) as trace:
        model(image((4, 3, 45, 50)))
    for s, stage in enumerate(model.keep_masks):
        for b, mask in enumerate(stage):
            x, out, _ = trace.calls[s][b]
            shift = 2 if b % 2 else 0
            assert_exact_count(mask, 0.5, scope, 4, shift)
            assert torch.equal(out[~mask.flatten(1)], x[~mask.flatten(1)])


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_ratio_per_block(variant, scope):
    depths = [len(stage) for stage in variant.build().keep_ratios]
    choices = iter([0.6, 1.0, 0.25, 0.8, 0.4, 1.0])
    ratios = [[next(choices) for _ in range(d)] for d in depths]
    model = build(variant, scope, keep=ratios)
    with torch.no_grad():
        model(image((2, 3, 45, 50)))
    for s, stage in enumerate(model.keep_masks):
        for b, mask in enumerate(stage):
            if ratios[s][b] == 1.0:
                assert mask.all()
            else:
                assert not mask.all()
                assert_exact_count(mask, ratios[s][b], scope, 4, 2 if b % 2 else 0)


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_idle_path_with_every_token_active_equals_the_dense_path(variant, scope):
    """So that a ratio just below 1 is no jump, padded borders included."""
    model = build(variant, scope, keep=0.9999).double()
    x = image((2, 3, 45, 58), dtype=torch.float64)
    outs, grads = gradients(model, x)
    assert all(mask.all() for stage in model.keep_masks for mask in stage)
    model.set_keep_ratios(1.0)
    dense_outs, dense_grads = gradients(model, x)
    for a, b in zip(outs, dense_outs, strict=True):
        assert_close(a, b, 1e-10)
    assert_same_gradients(grads, dense_grads, 1e-10)


@torch.no_grad()
@parametrize()
def test_idle_token_may_wake_in_the_next_block(variant):
    model = build(variant, keep=0.5)
    model(image((2, 3, 64, 80)))
    woken = [
        bool((~first & second).any())
        for stage in model.keep_masks
        for first, second in pairwise(stage)
    ]
    assert any(woken)


@pytest.mark.parametrize(
    ('variant', 'scorer'),
    [
        *((BY_NAME['swin'], scorer) for scorer in SCORERS if scorer != 'random'),
        *((variant, 'mean_query') for variant in FAMILIES if variant.name != 'swin'),
    ],
    ids=lambda value: getattr(value, 'name', value),
)
def test_every_scorer_is_used(variant, scorer):
    """No two scorers choose the same tokens."""
    masks = {}
    for name in (scorer, 'random'):
        torch.manual_seed(3)
        model = build(variant, scorer=name, keep=0.4)
        with torch.no_grad():
            model(image((1, 3, 64, 80)))
        masks[name] = model.keep_masks[0][0]
    assert not torch.equal(masks[scorer], masks['random'])
    agreement = (masks[scorer] & masks['random']).sum() / masks[scorer].sum()
    assert agreement < 0.7


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


def test_uniform_grid_covers_the_map_evenly():
    model = build(BY_NAME['vit'], scorer='uniform_grid', keep=0.25)
    with torch.no_grad():
        model(image((2, 3, 64, 64)))
    mask = model.keep_masks[0][0]
    assert torch.equal(mask[0], mask[1])
    quarters = mask[0].float().reshape(2, 8, 2, 8).sum((1, 3))
    assert quarters.sum() == 64
    assert quarters.min() >= 14, quarters


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


@parametrize()
def test_mean_distance_finds_the_odd_patch(variant):
    """One patch unlike the rest of an even image is active."""
    model = build(variant, scorer='mean_distance', keep=0.1)
    x = torch.zeros(1, 3, 64, 64)
    x[..., 20:40, 28:48] = 20 * torch.randn(3, 20, 20)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'pos_embed' in name:
                p.zero_()
        model(x)
    active = model.keep_masks[0][0][0].nonzero()
    # One token around the patch sees it too where patches overlap.
    inside = ((active >= torch.tensor([4, 6])) & (active <= torch.tensor([10, 12]))).all(1)
    assert inside.float().mean() > 0.9


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


@pytest.mark.usefixtures('each_window_path')
@pytest.mark.parametrize('scope', ['map', 'window_tokens', 'windows'])
def test_idle_tokens_are_no_keys_in_swin(scope):
    """Other values in idle rows change no active row; the grid fixes the selection."""
    for size in ((2, 3, 64, 80), (2, 3, 45, 50)):
        assert_idle_tokens_are_no_keys(build(BY_NAME['swin'], scope, 'uniform_grid'), size)


def assert_idle_tokens_are_no_keys(model, size):
    for s, blocks in enumerate(stage_blocks(model)):
        for b, block in enumerate(blocks):
            with BlockTrace(model) as trace, torch.no_grad():
                model(image(size))
            plain, mask = trace.calls[s][b], model.keep_masks[s][b].flatten(1)

            def disturb(_module, args, kwargs, mask=mask):
                x = args[0].clone()
                x[~mask] = 50 * torch.randn_like(x[~mask])
                return (x, *args[1:]), kwargs

            handle = block.register_forward_pre_hook(disturb, with_kwargs=True, prepend=True)
            with BlockTrace(model) as trace, torch.no_grad():
                model(image(size))
            handle.remove()
            after = model.keep_masks[s][b].flatten(1)
            assert torch.equal(after, mask)
            assert not torch.equal(trace.calls[s][b][0], plain[0])
            assert torch.equal(trace.calls[s][b][1][mask], plain[1][mask])


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


def test_dense_swin_does_not_exceed_mmdet():
    variant = BY_NAME['swin']
    x = image((1, 3, 90, 122))
    counts = []
    for model in (build(variant, keep=1.0), variant.build_twin()):
        model.eval()
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1]


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


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_image_does_not_depend_on_its_batch(variant, scope):
    model = build(variant, scope, 'mean_query')
    x = image((3, 3, 45, 58))
    x[1] *= 4
    with torch.no_grad():
        together = model(x)
        masks = model.keep_masks
        for i in range(3):
            alone = model(x[i : i + 1])
            for s, stage in enumerate(model.keep_masks):
                for b, mask in enumerate(stage):
                    assert torch.equal(mask[0], masks[s][b][i])
            for a, t in zip(alone, together, strict=True):
                assert_close(a[0], t[i], 1e-5)


@pytest.mark.parametrize(
    ('variant', 'scorer'),
    list(zip(FAMILIES[1:], cycle(DETERMINISTIC_SCORERS), strict=False)),
    ids=lambda value: getattr(value, 'name', value),
)
def test_same_input_same_output(variant, scorer):
    model = build(variant, scorer=scorer)
    x = image((2, 3, 45, 58))
    with torch.no_grad():
        first, masks = model(x), model.keep_masks
        second = model(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for s, stage in enumerate(model.keep_masks):
        for b, mask in enumerate(stage):
            assert torch.equal(mask, masks[s][b])


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_every_parameter_gets_a_gradient(variant, scope):
    model = build(variant, scope, 'mean_query', drop_path_rate=0.0).train()
    _, grads = gradients(model, image((2, 3, 64, 80)))
    for name, grad in grads.items():
        assert grad is not None, f'{name} has no gradient'
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, f'{name} has only zero gradients'


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_checkpointing_changes_nothing(variant, scope):
    """Also with dropout and random selection, which the second forward must repeat."""
    options = dict(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2)
    results = []
    for with_cp in (False, True):
        model = build(variant, scope, 'random', with_cp=with_cp, **options).train()
        torch.manual_seed(11)
        outs, grads = gradients(model, image((2, 3, 45, 58)))
        results.append((outs, grads, model.keep_masks))
    (outs, grads, masks), (cp_outs, cp_grads, cp_masks) = results
    for a, b in zip(cp_outs, outs, strict=True):
        assert torch.equal(a, b)
    assert_same_gradients(cp_grads, grads, 1e-6)
    for stage, cp_stage in zip(masks, cp_masks, strict=True):
        for mask, cp_mask in zip(stage, cp_stage, strict=True):
            assert torch.equal(mask, cp_mask)


# MiT's blocks are PVTv2's, which has more of them, and SVT has those of PCPVT; Swin V2's gradients
# are held against others'.
@pytest.mark.parametrize(
    ('variant', 'scope'),
    [p for p in SCOPES if p.values[0].name not in ('pvtv2', 'pcpvt', 'swinv2')],
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


@parametrize()
def test_input_gradient_reaches_idle_tokens(variant):
    """Idle tokens hand on the gradient of their outputs."""
    model = build(variant, keep=0.2)
    _, grads = gradients(model, image((1, 3, 64, 80)))
    patches = grads['input'].unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5))
    assert (patches > 0).all()
