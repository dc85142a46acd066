"""Recipes of classification: settings as the releases have them, multiply-adds as published."""

import copy
from typing import Any

import pytest
import torch
from config_zoo import ALL, Uninitialised, build, load, read
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, VISUALIZERS, DefaultScope

from idlevit_mm.analysis.flops import model_multiply_adds

pytest.importorskip('mmpretrain')

RECIPES = [name for name in ALL if name.startswith('imagenet/')]
SIZES = {'t': ('tiny', 192), 's': ('small', 384), 'b': ('base', 768), 'm': ('medium', 512)}
# Epochs, images of an update, learning rate (releases scale it by images / 512), its end, weight
# decay and warm-up: README of IdleViT and defaults of its main.py, run_code.sh and finetune.sh of
# EViT with its defaults, README of Evo-ViT. EViT is fine-tuned in eval mode, and the model of
# IdleViT gets no drop_path.
SETTINGS: dict[str, dict[str, Any]] = {
    'idlevit-deit': dict(
        schedule=(30, 2048, 1e-5 * 2048 / 512, 1e-6, 0.05, 0), drop_path=0.0, ratios='3+3+2'
    ),
    'idlevit-lvvit-s': dict(
        schedule=(30, 2048, 1e-5 * 2048 / 512, 1e-6, 0.05, 0), drop_path=0.0, ratios='4+4+4'
    ),
    'idlevit-lvvit-m': dict(
        schedule=(30, 2048, 1e-5 * 2048 / 512, 1e-6, 0.05, 0), drop_path=0.0, ratios='5+5+5'
    ),
    'evit-deit-s_8xb128-300e': dict(
        schedule=(300, 1024, 5e-4 * 1024 / 512, 1e-5, 0.05, 5), drop_path=0.1, ratios='evit'
    ),
    'evit-deit-s_8xb128-30e': dict(
        schedule=(30, 1024, 2e-5 * 1024 / 512, 2e-6, 1e-6, 0), drop_path=0.0, ratios='evit'
    ),
    'evovit-deit-t': dict(
        schedule=(300, 2048, 5e-4 * 2048 / 512, 1e-5, 0.05, 5), drop_path=0.0, ratios=None
    ),
    'evovit-deit': dict(
        schedule=(300, 1024, 5e-4 * 1024 / 512, 1e-5, 0.05, 5), drop_path=0.1, ratios=None
    ),
}
# Keep ratios of the releases' models.
KEEP = {
    'idlevit-deit-s_2xb1024-30e': (90, 80, 70, 60, 50),
    'idlevit-deit-b_2xb1024-30e': (90, 80, 70),
    'idlevit-lvvit-s_2xb1024-30e': (70,),
    'idlevit-lvvit-m_2xb1024-30e': (70,),
    'evit-deit-s_8xb128-300e': (90, 80, 70, 60, 50),
    'evit-deit-s_8xb128-30e': (90, 80, 70, 60, 50),
    'swin-t_8xb128-30e': (70, 50),
    'pvtv2-b2_8xb128-30e': (70, 50),
}
WHOLE = [
    *(f'deit-{size}_8xb128-300e' for size in 'tsb'),
    *('evovit-deit-t_8xb256-300e', 'evovit-deit-s_8xb128-300e', 'evovit-deit-b_8xb128-300e'),
    *('swin-t_8xb128-300e', 'pvtv2-b2_8xb128-300e'),
]


def test_all_recipes_are_there() -> None:
    kept = [f'{stem}-keep{keep}' for stem, ratios in KEEP.items() for keep in ratios]
    assert sorted(RECIPES) == sorted(f'imagenet/{stem}_in1k.py' for stem in (*kept, *WHOLE))


def test_settings_are_the_releases(subtests: pytest.Subtests) -> None:
    for name in RECIPES:
        stem = name.removeprefix('imagenet/').removesuffix('_in1k.py')
        for start, expected in SETTINGS.items():
            if stem.startswith(start):
                with subtests.test(name):
                    assert_settings(stem, read(name), **expected)
                break
        else:
            assert stem.startswith(('deit', 'swin', 'pvtv2')), f'{name} has no settings to compare'


def assert_settings(
    stem: str, cfg: Config, schedule: tuple, drop_path: float, ratios: str | None
) -> None:
    rates = cfg.param_scheduler
    # A warm-up of five epochs ends where the sixth begins.
    warmup = sum(one.end - 1 for one in rates if one.type == 'LinearLR')
    (cosine,) = (one for one in rates if one.type == 'CosineAnnealingLR')
    optimizer, epochs = cfg.optim_wrapper.optimizer, cfg.train_cfg.max_epochs
    images = cfg.auto_scale_lr.base_batch_size
    found = epochs, images, optimizer.lr, cosine.eta_min, optimizer.weight_decay, warmup
    assert found == pytest.approx(schedule)
    assert (cosine.begin, cosine.end, optimizer.type) == (0, epochs, 'AdamW')
    for warming in rates[:-1]:
        assert warming.start_factor * optimizer.lr == pytest.approx(1e-6)
    gpus, each = stem.split('_')[1].split('-')[0].split('xb')
    assert int(gpus) * int(each) == images
    assert int(each) == cfg.train_dataloader.batch_size
    model, backbone = cfg.model, cfg.model.backbone
    size, width = SIZES[stem.split('_')[0][-1]]
    assert (backbone.arch.split('-')[1], model.head.in_channels) == (size, width)
    assert (backbone.drop_path_rate, backbone.padded_images) == (drop_path, False)
    policy = dict(backbone.policy)
    kept = 0.01 * int(stem[-2:]) if 'keep' in stem else None
    if ratios is not None:
        assert backbone.keep_ratios.type == ratios
        assert backbone.keep_ratios.keep_ratio == pytest.approx(kept)
    losses = cfg.get('custom_hooks', [{}])[0].get('losses', [])
    weights = [(loss.type, pytest.approx(loss.loss_weight)) for loss in losses]
    if stem.startswith('idlevit'):
        assert policy == dict(type='IdleViT', scorer='class_query', rounding='floor')
        # --cutw 20, --distillw 10 and 100 times that: a mean over the channels of the class token,
        # or over all elements of the tokens, which ours sums.
        summed = 197 if 'lvvit' in stem else width
        expected = dict(TokenCutLoss=20, LogitDistillation=10, FeatureDistillation=1000 / summed)
        assert weights == list(expected.items())
        assert losses[0].weighting == 'published'
        assert losses[2].tokens == ('kept' if 'lvvit' in stem else 'class')
    elif stem.startswith('evit'):
        assert policy == dict(type='EViT', scorer='class_attention', fuse=True)
        assert list(backbone.keep_ratios.blocks) == [3, 6, 9]
        hook = dict(type='KeepRatioWarmupHook', begin=10, end=110, convert_to_iter_based=True)
        assert cfg.get('custom_hooks', []) == ([hook] if epochs == 300 else [])
    else:
        halves = [1.0] * 4 + [0.5] * 8
        options = dict(rank_at=[4, 8], representative=False, rounding='floor')
        assert policy == dict(options, type='EvoViT', alpha=halves)
        assert backbone.keep_ratios == halves
        assert cfg.custom_hooks == [dict(type='StageWiseHook', begin=200)]


# One of each kind; the others differ in widths and ratios.
BUILT = (
    *('idlevit-deit-s_2xb1024-30e-keep70', 'idlevit-lvvit-m_2xb1024-30e-keep70'),
    *('evit-deit-s_8xb128-300e-keep50', 'evovit-deit-t_8xb256-300e'),
    *('swin-t_8xb128-30e-keep70', 'pvtv2-b2_8xb128-30e-keep50'),
)


@pytest.mark.parametrize('name', BUILT)
def test_recipe_builds(name: str) -> None:
    """Model, optimiser, hooks, metric, data sets and pipelines; and the model classifies."""
    cfg = read(f'imagenet/{name}_in1k.py')
    with Uninitialised():
        model = build(cfg).eval()
    with torch.no_grad(), DefaultScope.overwrite_default_scope('mmpretrain'):
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)
        wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
        grouped = [id(p) for group in wrapper.optimizer.param_groups for p in group['params']]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
        # Hooks ask for the visualiser, and visualisers are global by name.
        VISUALIZERS.build({**cfg.visualizer, 'name': name})
        for hook in [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]:
            HOOKS.build(copy.deepcopy(hook))
        METRICS.build(dict(cfg.val_evaluator))
        for phase in ('train', 'val', 'test'):
            DATASETS.build({**cfg[f'{phase}_dataloader'].dataset, 'lazy_init': True})


# Multiply-adds in 1e9 at 224 x 224: whole models as mmpretrain's metafile has them, held to 1 %;
# and by keep ratio, of one decimal, held to its rounding: EViT's DeiT-S (arXiv 2202.07800), and
# LV-ViT dense, as DynamicViT (arXiv 2106.02034) counts it. IdleViT's are in test_seeds.py.
DENSE = {'t': 1.258219, 's': 4.607954, 'b': 17.581972}
ROUNDED = {
    'evit-deit-s_8xb128-30e': {1.0: 4.6, 0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3},
    # Most of what its head does is for every token.
    'idlevit-lvvit-s_2xb1024-30e': {1.0: 6.6},
    'idlevit-lvvit-m_2xb1024-30e': {1.0: 12.7},
}


def multiply_adds(cfg: Config) -> float:
    """Of the model of a recipe, in 1e9."""
    with Uninitialised():
        return model_multiply_adds(build(cfg), (224, 224))['total'] / 1e9


@pytest.mark.parametrize('size', DENSE)
def test_multiply_adds_of_dense_models(size: str) -> None:
    total = multiply_adds(read(f'imagenet/deit-{size}_8xb128-300e_in1k.py'))
    assert total == pytest.approx(DENSE[size], rel=0.01)


@pytest.mark.parametrize('name', ROUNDED)
def test_multiply_adds_of_others(name: str) -> None:
    for keep, published in ROUNDED[name].items():
        cfg = load(f'imagenet/{name}-keep70_in1k.py')
        cfg.model.backbone.keep_ratios.keep_ratio = keep
        assert multiply_adds(cfg) == pytest.approx(published, abs=0.05), keep
