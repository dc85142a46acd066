"""Token cut loss against matrices of all pairs, written without the package's own maths."""

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import FAMILIES, image, parametrize, randomize, variant_scopes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from torch.nn.attention import SDPBackend, sdpa_kernel

from idlevit_mm.layers import (
    LocallyGroupedAttention,
    ShiftWindowMSA,
    SpatialReductionAttention,
    kept_share,
)
from idlevit_mm.losses import TokenCutLoss
from idlevit_mm.losses.token_cut import kept_shares, token_cut

KINDS = ('inter', 'intra', 'both')
F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def random_mask(batch, tokens, seed=0):
    mask = noise(batch, tokens, seed=seed + 50) > 0
    mask[:, 0] = True
    return mask.to(F64)


def mean_logits(query, key, heads, scale):
    """Mean over heads of scaled logits of each head: (B, N, K)."""
    parts = [
        scale * q @ k.transpose(-1, -2)
        for q, k in zip(query.chunk(heads, -1), key.chunk(heads, -1), strict=True)
    ]
    return torch.stack(parts).mean(0)


def naive_cut(weights, m_rows, m_keys, kind, class_token=None):
    """The two formulas of the paper, element by element, for one image: W (N, K)."""
    differing = (m_rows[:, None] - m_keys[None, :]).abs() * weights
    if class_token is not None:
        differing = torch.cat([differing[:, :class_token], differing[:, class_token + 1 :]], 1)
    inter = differing.sum(1).square().mean()
    both_kept = m_rows[:, None] * m_keys[None, :] * weights
    intra = (both_kept.sum(1) - m_rows).square().mean()
    return dict(inter=inter, intra=intra, both=inter + intra)[kind]


# Windows


def naive_window_weights(attn, x, hw):
    """W (N, N) of every image, by padding, rolling and looping over pairs of slots."""
    (h, w), side, shift, msa = hw, attn.window_size, attn.shift_size, getattr(attn, 'w_msa', attn)
    channels = x.shape[-1]
    weight, bias = msa.qkv.weight, msa.qkv.bias
    bias = torch.zeros(3 * channels, dtype=F64) if bias is None else bias
    query = x @ weight[:channels].T + bias[:channels]
    key = x @ weight[channels : 2 * channels].T + bias[channels : 2 * channels]
    logits = mean_logits(query, key, msa.num_heads, msa.scale)
    padded_h, padded_w = -(-h // side) * side, -(-w // side) * side

    def place(index, length, padded):
        """Window, place in it and region of a coordinate along an axis."""
        rolled = (index - shift) % padded
        region = 0
        if shift:
            region = int(rolled >= padded - side) + int(rolled >= padded - shift)
        return rolled // side, rolled % side, region

    tokens = [(place(r, h, padded_h), place(c, w, padded_w)) for r in range(h) for c in range(w)]
    seen = torch.zeros(h * w, h * w, dtype=torch.bool)
    offset = torch.zeros(h * w, h * w, dtype=F64)
    for i, (ri, ci) in enumerate(tokens):
        for j, (rj, cj) in enumerate(tokens):
            same_window = (ri[0], ci[0]) == (rj[0], cj[0])
            same_region = (ri[2], ci[2]) == (rj[2], cj[2])
            seen[i, j] = same_window and same_region
            row, col = ri[1] - rj[1] + side - 1, ci[1] - cj[1] + side - 1
            if seen[i, j] and msa is not attn:
                table = msa.relative_position_bias_table
                offset[i, j] = table[row * (2 * side - 1) + col].mean()
    return (logits + offset).masked_fill(~seen, float('-inf')).softmax(-1)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.integers(1, 3),
    st.sampled_from([None, 0, 2]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
)
@example(2, None, 5, 7, True)
@example(3, 2, 4, 8, True)
@example(1, 2, 5, 7, False)
@example(3, 0, 9, 4, True)
@example(1, 0, 3, 2, False)
def test_windows(batch, shift, height, width, bias):
    """Swin's, and where the shift is None those of Twins."""
    hw = height, width
    if shift is None:
        attn = LocallyGroupedAttention(8, 2, 4, qkv_bias=bias)
    else:
        attn = ShiftWindowMSA(8, 2, 4, shift, qkv_bias=bias)
    randomize(attn.double())
    x = noise(batch, hw[0] * hw[1], 8)
    mask = random_mask(batch, hw[0] * hw[1])
    share = attn.kept_share(x, hw, mask)
    weights = naive_window_weights(attn, x, hw)
    torch.testing.assert_close(share, (weights @ mask[..., None])[..., 0])
    for kind in KINDS:
        want = torch.stack([naive_cut(w, m, m, kind) for w, m in zip(weights, mask, strict=True)])
        torch.testing.assert_close(token_cut(share, mask, kind), want.mean())


# Spatial reduction


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 3), st.sampled_from([1, 2, 3, 4]), st.integers(1, 9), st.integers(1, 9))
@example(3, 2, 4, 8)
@example(1, 4, 5, 7)
@example(3, 4, 3, 2)
@example(1, 2, 2, 9)
@example(1, 1, 3, 2)
def test_spatial_reduction(batch, ratio, height, width):
    hw = height, width
    attn = randomize(SpatialReductionAttention(8, 2, sr_ratio=ratio).double())
    (h, w), channels = hw, 8
    x = noise(batch, h * w, channels)
    mask = random_mask(batch, h * w)
    cells, kept = x, mask
    if ratio > 1:
        rows, cols = max(h // ratio, 1), max(w // ratio, 1)
        canvas = torch.zeros(batch, rows * ratio, cols * ratio, channels, dtype=F64)
        grid = x.view(batch, h, w, channels)[:, : rows * ratio, : cols * ratio]
        canvas[:, : grid.shape[1], : grid.shape[2]] = grid
        cells = F.conv2d(canvas.permute(0, 3, 1, 2), attn.sr.weight, attn.sr.bias, stride=ratio)
        cells = attn.norm(cells.flatten(2).transpose(1, 2))
        grid = mask.view(batch, h, w)
        kept = torch.stack(
            [
                grid[:, r * ratio : (r + 1) * ratio, c * ratio : (c + 1) * ratio].flatten(1).mean(1)
                for r in range(rows)
                for c in range(cols)
            ],
            dim=1,
        )
    weight, bias = attn.attn.in_proj_weight, attn.attn.in_proj_bias
    query = x @ weight[:channels].T + bias[:channels]
    key = cells @ weight[channels : 2 * channels].T + bias[channels : 2 * channels]
    weights = mean_logits(query, key, 2, (channels // 2) ** -0.5).softmax(-1)
    share = attn.kept_share(x, hw, mask)
    torch.testing.assert_close(share, (weights @ kept[..., None])[..., 0])
    for kind in KINDS:
        want = [naive_cut(*parts, kind) for parts in zip(weights, mask, kept, strict=True)]
        torch.testing.assert_close(token_cut(share, mask, kind), torch.stack(want).mean())


def test_several_masks_at_once():
    for attn in (ShiftWindowMSA(8, 2, 3, 1), SpatialReductionAttention(8, 2, sr_ratio=2)):
        randomize(attn).double()
        x, masks = noise(2, 20, 8), torch.stack([random_mask(2, 20, s) for s in range(3)], -1)
        share = attn.kept_share(x, (4, 5), masks)
        for v in range(3):
            torch.testing.assert_close(share[..., v], attn.kept_share(x, (4, 5), masks[..., v]))


# Plain attention, with a class token


@pytest.mark.parametrize('masks', [(), (2,)])
def test_a_fused_kernel_computes_the_share(masks):
    """Only kernels that never store the matrix of all pairs are allowed here."""
    query, key = noise(2, 70, 16).requires_grad_(), noise(2, 50, 16, seed=1)
    mask = (noise(2, 50, *masks, seed=2) > 0).to(F64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        share = kept_share(query, key, mask, 0.1)
        share.sum().backward()
    weights = (0.1 * query @ key.mT).softmax(-1)
    want = weights @ mask if masks else (weights @ mask[..., None])[..., 0]
    torch.testing.assert_close(share, want)


def test_bounds():
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert all(token_cut(mask, mask, kind) == 0 for kind in KINDS)
    assert token_cut(1 - mask, mask, 'inter') == 1
    assert token_cut(1 - mask, mask, 'intra') == 0.5


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_those_of_differences(kind):
    window = randomize(ShiftWindowMSA(4, 2, 2, 1).double())
    cells = randomize(SpatialReductionAttention(4, 2, sr_ratio=2).double())
    x, mask = noise(2, 6, 4).requires_grad_(), random_mask(2, 6)
    for attn in (window, cells):
        torch.autograd.gradcheck(
            lambda x, *_, attn=attn: token_cut(attn.kept_share(x, (2, 3), mask), mask, kind),
            (x, *[p for p in attn.parameters() if p.requires_grad]),
        )


VIT = dict(
    type='IdleVisionTransformer',
    img_size=32,
    patch_size=8,
    embed_dims=8,
    num_layers=3,
    num_heads=2,
    mlp_ratio=2,
)


@pytest.mark.parametrize('policy', [dict(), dict(type='EViT'), dict(type='EvoViT')])
@pytest.mark.parametrize(('class_token', 'batch'), [(True, 3), (False, 1)])
def test_vision_transformer(policy, class_token, batch):
    """Fused tokens of EViT stand behind the map; what a block adds itself is not in its input."""
    model = MODELS.build(
        dict(VIT, keep_ratios=[1.0, 0.6, 0.5], policy=policy, with_cls_token=class_token)
    )
    randomize(model).double().train().record_inputs = True
    model(image((batch, 3, 24, 45), dtype=F64))
    (record,), (blocks,) = model.records, model.idle_blocks
    assert record.inputs[0] is None
    wants = {kind: [] for kind in KINDS}
    for index in (1, 2):
        block, x = blocks[index], record.inputs[index]
        assert x.shape[1] >= 15 + class_token
        weight, bias = block.attn.attn.in_proj_weight, block.attn.attn.in_proj_bias
        query, key, _ = (block.ln1(x) @ weight.T + bias).chunk(3, -1)
        weights = mean_logits(query, key, 2, 0.5).softmax(-1)
        size = record.hw_shape[0] * record.hw_shape[1]
        for ids, w in zip(record.plans[index].rows.ids.tolist(), weights, strict=True):
            mask = torch.zeros(x.shape[1], dtype=F64)
            mask[[i for i in ids if i < x.shape[1]]] = 1.0
            mask[size : size + class_token] = 1.0
            for kind in KINDS:
                cut = naive_cut(w, mask, mask, kind, size if class_token else None)
                wants[kind].append(cut)
    for kind in KINDS:
        loss = TokenCutLoss(kind, loss_weight=3.0).of_backbones([model])
        torch.testing.assert_close(loss, 3 * torch.stack(wants[kind]).mean())
        assert loss > 0
    loss.backward()
    for block in blocks[1:]:
        for part in block.attn.attn.in_proj_weight.grad.chunk(3)[:2]:
            assert part.abs().sum() > 0


# Real backbones


def run(variant, scope='map', keep=0.5, size=(2, 3, 45, 58), dtype=torch.float32, seed=0, **kwargs):
    model = variant.build(keep_ratios=keep, policy=dict(scope=scope), **kwargs)
    randomize(model, seed)
    model.to(dtype).train().record_inputs = True
    model(image(size, dtype=dtype))
    return model


def test_mean_over_idle_blocks_of_all_backbones():
    backbones, loss = [run(FAMILIES[0], seed=seed) for seed in range(3)], TokenCutLoss()
    each = torch.stack([loss.of_backbones([backbone]) for backbone in backbones])
    torch.testing.assert_close(loss.of_backbones(backbones), each.mean())
    assert loss.loss_weight == 20


@pytest.mark.parametrize(('variant', 'scope'), variant_scopes())
def test_reaches_queries_and_keys_only_of_attention(variant, scope):
    model = run(variant, scope)
    if scope == 'windows':
        with pytest.raises(ValueError, match="policy.scope='windows'.*0 by definition"):
            TokenCutLoss().prepare(model, dict(backbone=model), None)
        model = variant.build(keep_ratios=0.5, policy=dict(attention_ratios=0.2))
        with pytest.raises(ValueError, match='has policy.attention_ratios, so that not all'):
            TokenCutLoss().prepare(model, dict(backbone=model), None)
        return
    for kind in KINDS:
        loss = TokenCutLoss(kind).of_backbones([model])
        assert 0 < loss < 40
    loss.backward()
    for block in (block for stage in model.idle_blocks for block in stage):
        attn = block.attn
        msa = getattr(attn, 'w_msa', attn)
        weight = msa.qkv.weight if hasattr(msa, 'qkv') else attn.attn.in_proj_weight
        for part in weight.grad.chunk(3)[:2]:
            assert part.isfinite().all()
            assert part.abs().sum() > 0


@parametrize()
def test_every_policy_that_chooses_tokens(variant):
    for policy in ('IdleViT', 'EViT', 'EvoViT'):
        assert_shares(variant, policy)


def assert_shares(variant, policy):
    # Evo-ViT knows no class attention before the first block of a plain ViT.
    first_dense = policy == 'EvoViT' and variant.name == 'vit'
    keep = [1.0, 0.6, 0.6] if first_dense else 0.6
    model = randomize(variant.build(keep_ratios=keep, policy=dict(type=policy))).train()
    model.record_inputs = True
    outs = model(image((2, 3, 45, 58)))
    shares = list(kept_shares(model))
    assert len(shares) == sum(model.depths) - first_dense
    masks = [mask.flatten(1).float() for stage in model.keep_masks for mask in stage]
    for (share, mask), want in zip(shares, masks[first_dense:], strict=True):
        assert torch.equal(mask[:, : want.shape[1]], want)
        assert share.shape == mask.shape
        assert share.min() >= 0
        assert share.max() < 1 + 1e-5
    loss = TokenCutLoss().of_backbones([model])
    (loss + sum(out.sum() for out in outs)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@parametrize()
def test_what_is_frozen_dense_or_not_on_record(variant):
    model = run(variant, frozen_stages=variant.frozen_first)
    TokenCutLoss().of_backbones([model]).backward()
    frozen = {
        id(parameter)
        for part in model._frozen_modules()
        for parameter in ([part] if isinstance(part, torch.nn.Parameter) else part.parameters())
    }
    assert frozen
    assert all(p.grad is None for p in model.parameters() if id(p) in frozen)
    assert any(p.grad is not None for p in model.parameters())
    loss = TokenCutLoss().of_backbones([run(variant, keep=1.0)])
    assert loss == 0
    loss.backward()
    model = variant.build(keep_ratios=0.5)
    model(image((1, 3, 45, 58)))
    with pytest.raises(RuntimeError, match='record_inputs=True'):
        TokenCutLoss().of_backbones([model])


@pytest.mark.parametrize(
    ('variant', 'dtype'),
    list(zip(FAMILIES, (torch.bfloat16, torch.float16) * 4, strict=False)),
    ids=lambda value: getattr(value, 'name', str(value)),
)
def test_half_precision(variant, dtype):
    """Windows of padding alone hide every key; that must not become NaN."""
    exact = TokenCutLoss().of_backbones([run(variant, size=(1, 3, 36, 20))])
    with torch.autocast('cpu', dtype):
        model = run(variant, size=(1, 3, 36, 20))
        loss = TokenCutLoss().of_backbones([model])
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.1 * exact
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(kind='outer'), ValueError, "kind='outer' is unknown; allowed: inter, intra, both"),
        (dict(loss_weight=-1), ValueError, 'loss_weight=-1 must be at least 0'),
        (dict(loss_weight='20'), TypeError, "loss_weight='20' must be a number"),
        (dict(name='cut'), ValueError, "name='cut' must contain 'loss'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        TokenCutLoss(**options)
