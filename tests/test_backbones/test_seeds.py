"""IdleVisionTransformer against IdleViT, EViT and Evo-ViT as published (seeds_reference.py)."""

import pytest
import seeds_reference as seeds
import torch
from backbone_zoo import assert_close, image, randomize
from mmengine.registry import MODELS
from torch import nn

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.flops import backbone_multiply_adds

C, HEADS, LAYERS = 48, 3, 12
LN = dict(type='LN', eps=1e-6)
SMALL = dict(embed_dims=C, num_layers=LAYERS, num_heads=HEADS, norm_cfg=LN, output_cls_token=True)
# Patch grid, and image sizes that give it: whole patches, and ones that need padding.
GRIDS = {(5, 7): (75, 106), (14, 14): (219, 222), (6, 8): (90, 122)}
CASES = ((5, 7), 1), ((5, 7), 3), ((14, 14), 1), ((6, 8), 3)


def idle_vit(**kwargs):
    if 'IdleVisionTransformer' not in MODELS.module_dict:
        pytest.skip('IdleVisionTransformer is not there yet')
    return MODELS.build(dict(type='IdleVisionTransformer', **kwargs)).eval()


def table_size(grid):
    return dict(img_size=(16 * grid[0], 16 * grid[1]))


def small_images(grid, batch):
    return image((batch, 3, *GRIDS[grid]), seed=3, dtype=torch.float64)


def flat(feature_map):
    return feature_map.flatten(2).transpose(1, 2)


# Section 5 of the design: the figures of the paper, in units of 1e9.
DEIT_S = {1.0: 4.60, 0.9: 4.07, 0.8: 3.62, 0.7: 3.24, 0.6: 2.91, 0.5: 2.64}
DEIT_B = {1.0: 17.56, 0.7: 12.47}
PUBLISHED = [
    *(pytest.param('deit-small', 384, r, g, id=f'S-{r}') for r, g in DEIT_S.items()),
    *(pytest.param('deit-base', 768, r, g, id=f'B-{r}') for r, g in DEIT_B.items()),
]


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


def cases(names, *values):
    """``parametrize`` over the cases, each with values of its own."""
    chosen = [(*case, *value) for case, value in zip(CASES, values, strict=True)]
    return pytest.mark.parametrize(('grid', 'batch', *names), chosen)


@cases(['keep_ratio'], [0.9], [0.5], [0.5], [0.7])
def test_idlevit(grid, batch, keep_ratio):
    counts = seeds.idlevit_counts(grid[0] * grid[1], keep_ratio)
    assert_as_published(
        grid,
        batch,
        lambda x, weights: seeds.idlevit(x, weights, HEADS, counts),
        policy=dict(type='IdleViT', scorer='class_query', rounding='floor'),
        keep_ratios=dict(type='powers', keep_ratio=keep_ratio, first_idle=4),
    )


@pytest.mark.parametrize(('grid', 'batch'), CASES)
def test_fewer_patches_attend(grid, batch):
    patches = grid[0] * grid[1]
    counts = [patches] * 4 + [round(0.6 * patches)] * 8
    few = round(0.2 * patches)
    assert_as_published(
        grid,
        batch,
        lambda x, weights: seeds.idlevit(x, weights, HEADS, counts, few),
        policy=dict(type='IdleViT', scorer='class_query', attention_ratios=0.2),
        keep_ratios=[[1.0] * 4 + [0.6] * 8],
    )


@cases(['keep_ratio', 'fuse'], [0.7, False], [0.5, True], [0.7, True], [0.5, False])
def test_evit(grid, batch, fuse, keep_ratio):
    assert_as_published(
        grid,
        batch,
        lambda x, weights: seeds.evit(x, weights, HEADS, keep_ratio, fuse=fuse),
        policy=dict(type='EViT', scorer='class_attention', fuse=fuse),
        keep_ratios=dict(type='evit', keep_ratio=keep_ratio, blocks=[3, 6, 9]),
    )


@cases(
    ['options'],
    [dict(alpha=0.5)],
    [dict(alpha=0.2)],
    [dict(alpha=0.5, representative=False)],
    [dict(alpha=0.2)],
)
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
