"""IdleVisionTransformer against IdleViT, EViT and Evo-ViT as published (seeds_reference.py)."""

import math

import pytest
import seeds_reference as seeds
import torch
from backbone_zoo import assert_close, image, randomize
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.flops import backbone_multiply_adds

C, HEADS, LAYERS = 48, 3, 12
LN = dict(type='LN', eps=1e-6)
SMALL = dict(embed_dims=C, num_layers=LAYERS, num_heads=HEADS, norm_cfg=LN, output_cls_token=True)
# Patch grid, and image sizes that give it: whole patches, and ones that need padding.
GRIDS = {(5, 7): (75, 106), (14, 14): (219, 222), (6, 8): (90, 122)}
CASES = [
    pytest.param(grid, batch, id=f'{grid[0]}x{grid[1]}-b{batch}')
    for grid, batch in (((5, 7), 1), ((5, 7), 3), ((14, 14), 1), ((6, 8), 3))
]


def idle_vit(**kwargs):
    if 'IdleVisionTransformer' not in MODELS.module_dict:
        pytest.skip('IdleVisionTransformer is not there yet')
    return MODELS.build(dict(type='IdleVisionTransformer', **kwargs)).eval()


def table_size(grid):
    return dict(img_size=(16 * grid[0], 16 * grid[1]))


def mmseg_vit(grid, seed=1, **kwargs):
    vit = pytest.importorskip('mmseg.models.backbones.vit')
    options = {**SMALL, **table_size(grid), 'patch_bias': True, 'final_norm': True, **kwargs}
    model = randomize(vit.VisionTransformer(**options).double(), seed)
    model.eval()  # mmseg's returns None
    return model


def small_images(grid, batch):
    return image((batch, 3, *GRIDS[grid]), seed=3, dtype=torch.float64)


def flat(feature_map):
    return feature_map.flatten(2).transpose(1, 2)


# --- the reference itself ---------------------------------------------------------------------


ALL_KEPT = {
    'idlevit': lambda x, w: seeds.idlevit(x, w, HEADS, [x.shape[1] - 1] * LAYERS),
    'evit': lambda x, w: seeds.evit(x, w, HEADS, 1.0),
    'evovit': lambda x, w: seeds.evovit(x, w, HEADS, keep_ratio=1.0),
}


@torch.no_grad()
@pytest.mark.parametrize('name', ALL_KEPT)
@pytest.mark.parametrize(('grid', 'batch'), CASES[:2])
def test_reference_with_all_tokens_is_the_dense_model(name, grid, batch):
    model = mmseg_vit(grid)
    weights = model.state_dict()
    x = small_images(grid, batch)
    feature_map, cls = model(x)[-1]
    result = ALL_KEPT[name](seeds.embed(x, weights), weights)
    assert_close(result.cls, cls, 1e-11)
    assert_close(result.map, flat(feature_map), 1e-11)
    assert result.kept == [[list(range(grid[0] * grid[1]))] * LAYERS] * batch


def dense_attention(layer, x, keys):
    """Update (1, T, C) by attention in mmseg's layer, and the class token's row (T,)."""
    y = layer.ln1(x).transpose(0, 1)  # torch's module wants (T, 1, C)
    update, attention = layer.attn.attn(y, y, y, key_padding_mask=~keys[None])
    return update.transpose(0, 1), attention[0, 0]


class MaskedViT:
    """The algorithms again, as masks on the layers of mmseg's dense model; one image.

    Tokens are (1, T, C): class token, patches, then tokens that were made up. ``keys`` (T,) says
    which of them attend and are attended to.
    """

    def __init__(self, model, x):
        self.model = model
        self.x = seeds.embed(x, model.state_dict())
        self.keys = torch.ones(self.x.shape[1], dtype=torch.bool)

    def attention(self, i):
        return dense_attention(self.model.layers[i], self.x, self.keys)

    def mlp(self, i):
        """Update (1, T, C) by the MLP."""
        return self.model.layers[i].ffn(self.model.layers[i].ln2(self.x), identity=0 * self.x)

    def only_active(self, update):
        return update * self.keys[None, :, None]

    def append(self, token):
        self.x = torch.cat([self.x, token.view(1, 1, -1)], dim=1)
        self.keys = torch.cat([self.keys, torch.ones(1, dtype=torch.bool)])

    def result(self, patches):
        x = self.model.ln1(self.x)
        return x[:, 0], x[:, 1 : 1 + patches]


def top(scores, count):
    """Mask of the highest scores (T,)."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask


def assert_same(result, masked, patches):
    cls, feature_map = masked.result(patches)
    assert_close(result.cls, cls, 1e-10)
    assert_close(result.map, feature_map, 1e-10)


@torch.no_grad()
def test_reference_idlevit_is_masking():
    grid, patches = (5, 7), 35
    model = mmseg_vit(grid, num_heads=1)  # with one head the logits rank as their softmax does
    x = small_images(grid, 1)
    counts = [35] * 4 + [20, 9, 30, 1, 34, 17, 17, 5]
    weights = model.state_dict()
    result = seeds.idlevit(seeds.embed(x, weights), weights, 1, counts)
    masked = MaskedViT(model, x)
    for i, count in enumerate(counts):
        masked.keys[:] = True
        _, row = masked.attention(i)
        masked.keys[1:] = top(row[1:], count)
        assert result.kept[0][i] == masked.keys[1:].nonzero().flatten().tolist()
        masked.x = masked.x + masked.only_active(masked.attention(i)[0])
        masked.x = masked.x + masked.only_active(masked.mlp(i))
    assert_same(result, masked, patches)


@torch.no_grad()
@pytest.mark.parametrize('fuse', [True, False])
def test_reference_evit_is_masking(fuse):
    grid, patches = (5, 7), 35
    model = mmseg_vit(grid)
    x = small_images(grid, 1)
    weights = model.state_dict()
    result = seeds.evit(seeds.embed(x, weights), weights, HEADS, 0.7, fuse=fuse)
    masked = MaskedViT(model, x)
    for i in range(LAYERS):
        update, row = masked.attention(i)
        masked.x = masked.x + masked.only_active(update)
        if i in (3, 6, 9):
            row[0] = 2.0  # the class token stays
            before = masked.keys.clone()
            stays = 1 + math.ceil(0.7 * (int(before.sum()) - 1))
            masked.keys = top(row * before, stays)
            dropped = row * (before & ~masked.keys)
            if fuse:
                masked.append(dropped @ masked.x[0])
        masked.x = masked.x + masked.only_active(masked.mlp(i))
        active = masked.keys[1 : 1 + patches].nonzero().flatten().tolist()
        assert [name for name in result.kept[0][i] if name < patches] == active
        assert len(result.kept[0][i]) == int(masked.keys.sum()) - 1
    assert_same(result, masked, patches)


@torch.no_grad()
@pytest.mark.parametrize('representative', [True, False])
def test_reference_evovit_is_masking(representative):
    grid, patches = (5, 7), 35
    model = mmseg_vit(grid)
    x = small_images(grid, 1)
    weights = model.state_dict()
    result = seeds.evovit(
        seeds.embed(x, weights), weights, HEADS, alpha=0.3, representative=representative
    )
    masked = MaskedViT(model, x)
    running = None
    for i in range(LAYERS):
        idle = torch.zeros(patches, dtype=torch.bool)
        if i >= 4:
            idle = ~top(running, 17)
            masked.keys = torch.cat([torch.tensor([True]), ~idle])
            if representative:
                w = running * idle
                masked.append(w / w.sum() @ masked.x[0, 1:])
        first, row = masked.attention(i)
        masked.x = masked.x + masked.only_active(first)
        second = masked.mlp(i)
        masked.x = masked.x + masked.only_active(second)
        if masked.x.shape[1] > 1 + patches:
            masked.x[:, 1 : 1 + patches][:, idle] += first[:, -1] + second[:, -1]
            masked.x, masked.keys = masked.x[:, :-1], masked.keys[:-1]
        row = row[1 : 1 + patches]
        update = row if running is None else 0.7 * running + 0.3 * row
        running = update if running is None else torch.where(idle, running, update)
        assert result.kept[0][i] == (~idle).nonzero().flatten().tolist()
    assert_same(result, masked, patches)


@torch.no_grad()
def test_mass_of_the_fused_token():
    """The fused token weighs what the class token paid to those dropped: it is no mean."""
    model = mmseg_vit((5, 7))
    weights = model.state_dict()
    tokens = seeds.split(seeds.embed(small_images((5, 7), 1), weights)[0], weights)
    _, attention = seeds.attention_update(tokens, weights, 3, HEADS)
    x = torch.stack(list(tokens.values()))[None]
    _, row = dense_attention(model.layers[3], x, torch.ones(36, dtype=torch.bool))
    assert_close(torch.stack(list(attention.values())), row[1:], 1e-12)
    ones = {name: torch.ones(C, dtype=torch.float64) for name in tokens}
    stays, dropped = seeds._reorganise(ones, attention, 0.5, 38, fuse=True)
    mass = row[1:].sort().values[:17].sum()
    assert (len(stays), len(dropped)) == (1 + 18 + 1, 17)
    assert_close(stays[38], mass.expand(C), 1e-12)
    assert 0.01 < mass < 0.5, 'neither empty nor renormalised'


@torch.no_grad()
def test_fused_tokens_compete_and_are_counted():
    model = mmseg_vit((5, 7))
    weights = model.state_dict()
    tokens = seeds.embed(small_images((5, 7), 3), weights)
    fused = seeds.evit(tokens, weights, HEADS, 0.7)
    plain = seeds.evit(tokens, weights, HEADS, 0.7, fuse=False)
    # ceil(0.7 * 35) = 25, + 1; ceil(0.7 * 26) = 19, + 1; ceil(0.7 * 20) = 14, + 1.
    assert [len(k) for k in fused.kept[1]] == [35] * 3 + [26] * 3 + [20] * 3 + [15] * 3
    # ceil(0.7 * 25) = 18; ceil(0.7 * 18) = 13.
    assert [len(k) for k in plain.kept[1]] == [35] * 3 + [25] * 3 + [18] * 3 + [13] * 3
    assert all(35 + 3 in image_kept[3] for image_kept in fused.kept)
    assert all(35 + 9 in image_kept[11] for image_kept in fused.kept)


def test_schedule_of_idlevit():
    assert seeds.idlevit_counts(196, 0.5) == [196] * 4 + [98] * 3 + [49] * 3 + [24] * 2
    lvvit_s = seeds.idlevit_counts(100, 0.5, layers=16)
    assert lvvit_s == [100] * 4 + [50] * 4 + [25] * 4 + [12] * 4
    lvvit_m = seeds.idlevit_counts(100, 0.5, layers=20, first=5)
    assert lvvit_m == [100] * 5 + [50] * 5 + [25] * 5 + [12] * 5


# Section 5 of the design: the figures of the paper, in units of 1e9.
DEIT_S = {1.0: 4.60, 0.9: 4.07, 0.8: 3.62, 0.7: 3.24, 0.6: 2.91, 0.5: 2.64}
DEIT_B = {1.0: 17.56, 0.7: 12.47}
PUBLISHED = [
    *(pytest.param('deit-small', 384, r, g, id=f'S-{r}') for r, g in DEIT_S.items()),
    *(pytest.param('deit-base', 768, r, g, id=f'B-{r}') for r, g in DEIT_B.items()),
]


@pytest.mark.parametrize(('_arch', 'embed_dims', 'keep_ratio', 'giga'), PUBLISHED)
def test_reference_counts_are_the_published_ones(_arch, embed_dims, keep_ratio, giga):
    counts = seeds.idlevit_counts(196, keep_ratio)
    total = seeds.multiply_adds(196, embed_dims, counts)
    assert total / 1e9 == pytest.approx(giga, rel=0.002)


@torch.no_grad()
@pytest.mark.parametrize('keep_ratio', [1.0, 0.7])
def test_reference_counts_are_those_of_the_reference(keep_ratio):
    model = mmseg_vit((5, 7))
    weights = model.state_dict()
    tokens = seeds.embed(small_images((5, 7), 1), weights)
    counts = seeds.idlevit_counts(35, keep_ratio)
    counter = FlopCounterMode(display=False)
    with counter:
        seeds.idlevit(tokens, weights, HEADS, counts)
    expected = seeds.multiply_adds(35, C, counts, embedding=False)
    assert counter.get_total_flops() == 2 * expected


# --- IdleVisionTransformer --------------------------------------------------------------------


@torch.no_grad()
def assert_as_published(grid, batch, reference, **kwargs):
    """Same kept patches, class features and final map as ``reference(tokens, weights)``."""
    model = randomize(idle_vit(**SMALL, **table_size(grid), **kwargs).double(), 1)
    weights = model.state_dict()
    x = small_images(grid, batch)
    result = reference(seeds.embed(x, weights), weights)
    patches = grid[0] * grid[1]
    sizes = {len(kept) for layers in result.kept for kept in layers}
    assert min(sizes) < patches, 'the reference kept everything'
    feature_map, cls = model(x)[-1]
    for layer, mask in enumerate(model.keep_masks[0]):
        assert mask.shape == (batch, *grid)
        for kept, image_mask in zip(result.kept, mask, strict=True):
            own = image_mask.flatten().nonzero().flatten().tolist()
            assert own == [name for name in kept[layer] if name < patches], f'layer {layer}'
    assert len(model.keep_masks[0]) == LAYERS
    assert_close(cls, result.cls, 1e-9, 'class features')
    assert_close(flat(feature_map), result.map, 1e-9, 'map')


@pytest.mark.parametrize('keep_ratio', [0.9, 0.7, 0.5])
@pytest.mark.parametrize(('grid', 'batch'), CASES)
def test_idlevit(grid, batch, keep_ratio):
    counts = seeds.idlevit_counts(grid[0] * grid[1], keep_ratio)
    assert_as_published(
        grid,
        batch,
        lambda x, weights: seeds.idlevit(x, weights, HEADS, counts),
        policy=dict(type='IdleViT', scorer='class_query', rounding='floor'),
        keep_ratios=dict(type='powers', keep_ratio=keep_ratio, first_idle=4),
    )


@pytest.mark.parametrize('keep_ratio', [0.7, 0.5])
@pytest.mark.parametrize('fuse', [True, False])
@pytest.mark.parametrize(('grid', 'batch'), CASES)
def test_evit(grid, batch, fuse, keep_ratio):
    assert_as_published(
        grid,
        batch,
        lambda x, weights: seeds.evit(x, weights, HEADS, keep_ratio, fuse=fuse),
        policy=dict(type='EViT', scorer='class_attention', fuse=fuse),
        keep_ratios=dict(type='evit', keep_ratio=keep_ratio, blocks=[3, 6, 9]),
    )


@pytest.mark.parametrize(
    'options', [dict(alpha=0.5), dict(alpha=0.2), dict(alpha=0.5, representative=False)]
)
@pytest.mark.parametrize(('grid', 'batch'), CASES)
def test_evovit(grid, batch, options):
    assert_as_published(
        grid,
        batch,
        lambda x, weights: seeds.evovit(x, weights, HEADS, **options),
        policy=dict(type='EvoViT', scorer='class_attention', rounding='floor', **options),
        keep_ratios=[[1.0] * 4 + [0.5] * 8],
    )


WITH_REGISTERS = {
    'IdleViT': (
        lambda x, w: seeds.idlevit(x, w, HEADS, [35] * 4 + [18] * 8),
        dict(scorer='class_query'),
    ),
    'EViT': (lambda x, w: seeds.evit(x, w, HEADS, 0.5, range(4, 12)), {}),
    'EvoViT': (lambda x, w: seeds.evovit(x, w, HEADS), dict(rounding='floor')),
}


@pytest.mark.parametrize('policy', WITH_REGISTERS)
def test_registers_and_layer_scale(policy):
    """Registers are always active, are no candidates, and get no share of the class attention."""
    reference, options = WITH_REGISTERS[policy]
    assert_as_published(
        (5, 7),
        2,
        reference,
        policy=dict(type=policy, **options),
        keep_ratios=[[1.0] * 4 + [0.5] * 8],
        num_registers=4,
        layer_scale=0.1,
    )


def build_idlevit(arch, keep_ratio):
    return idle_vit(
        arch=arch,
        policy=dict(type='IdleViT', scorer='class_query', rounding='floor'),
        keep_ratios=dict(type='powers', keep_ratio=keep_ratio, first_idle=4),
    )


@pytest.mark.parametrize(('arch', 'embed_dims', 'keep_ratio', 'giga'), PUBLISHED)
def test_multiply_adds_are_the_published_ones(arch, embed_dims, keep_ratio, giga):
    count = backbone_multiply_adds(build_idlevit(arch, keep_ratio), (224, 224))
    assert count / 1e9 == pytest.approx(giga, rel=0.01)
    expected = seeds.multiply_adds(196, embed_dims, seeds.idlevit_counts(196, keep_ratio))
    assert count == pytest.approx(expected, rel=0.002)


# --- shapes of the published models -----------------------------------------------------------


def parameters(model: nn.Module, without=()):
    return sum(
        p.numel() for name, p in model.named_parameters() if name.split('.')[0] not in without
    )


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_parameters_of_deit(size):
    timm = pytest.importorskip('timm')
    with torch.device('meta'):
        theirs = timm.create_model(f'deit_{size}_patch16_224', pretrained=False)
    published = dict(tiny=5.7, small=22.1, base=86.6)[size]
    assert parameters(theirs) / 1e6 == pytest.approx(published, abs=0.06)
    ours = idle_vit(arch=f'deit-{size}')
    assert parameters(ours) == parameters(theirs, without=('head',))


@pytest.mark.parametrize(
    ('arch', 'embed_dims', 'published'), [('lvvit-small', 384, 26.2), ('lvvit-medium', 512, 55.8)]
)
def test_parameters_of_lvvit(arch, embed_dims, published):
    heads = 2 * 1000 * (embed_dims + 1)  # of the class token, and of every token in training
    total = parameters(idle_vit(arch=arch)) + heads
    assert total / 1e6 == pytest.approx(published, rel=0.005)
