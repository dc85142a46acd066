"""Every config of digit scenes builds, trains and tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from config_zoo import (
    ALL,
    CONFIGS,
    DIGITS,
    Uninitialised,
    build,
    differences,
    is_plain,
    load,
    read,
)
from digit_scenes import CLASSES
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope

from idlevit_mm.engine import ResumableRunner

POLICIES = [name for name in DIGITS if '/policies/' in name]
SCRATCH = [
    name
    for name in DIGITS
    if name not in POLICIES and not name.endswith(('_dense_digits.py', '_finetune_digits.py'))
]
MODEL_NAMES = {
    'retinanet_idle-swin',
    'retinanet_idle-pvtv2',
    'mask-rcnn_idle-swin',
    'upernet_idle-swin',
    'fpn_idle-pvt',
    'fpn_idle-pvtv2',
    'retinanet_idle-vit',
    'fpn_idle-vit',
}
# What each policy or signal must show in the log, besides the losses of the model.
LOGGED = {
    'retinanet_idle-swin_evit': ['keep_ratio'],
    'retinanet_idle-swin_evovit': [],
    'retinanet_idle-swin_sparsevit': ['keep_ratio'],
    'retinanet_idle-swin_larger-images_dense': [],
    'retinanet_idle-swin_larger-images': ['loss_distill_feature'],
    'retinanet_idle-swin_learned': [],
    'retinanet_idle-swin_random-ratios': ['keep_ratio'],
    'retinanet_idle-swin_token-cut': ['loss_token_cut'],
    'retinanet_idle-swin_distill': ['loss_distill_feature'],
    'retinanet_idle-swin_recipe': ['loss_distill_feature'],
    'retinanet_idle-pvtv2_recipe': ['loss_distill_feature'],
    'fpn_idle-pvtv2_recipe': ['loss_distill_feature'],
}
# IdleViT's r, r^2, r^3 over the thirds of the blocks that idle, by the depth of a plain ViT.
PLAIN_RATIOS = {
    8: [1.0] * 2 + [0.7] * 2 + [0.7**2] * 2 + [0.7**3] * 2,
}


def expected_ratios(name: str, depths: tuple[int, ...]) -> list[list[float]]:
    if '_dense_' in name:
        return [[1.0] * depth for depth in depths]
    if is_plain(name):
        return [PLAIN_RATIOS[depth] for depth in depths]
    return [[0.7] * depth for depth in depths]


def test_all_digit_configs_are_there() -> None:
    expected = {
        f'digit_scenes/{model}{kind}_digits.py'
        for model in MODEL_NAMES
        for kind in ('', '_dense', '_finetune')
    }
    policies = {f'digit_scenes/policies/{name}_digits.py' for name in LOGGED}
    assert set(DIGITS) == expected | policies


def test_settings_and_ratios_of_digit_configs(subtests: pytest.Subtests) -> None:
    for name in DIGITS:
        with subtests.test(name):
            assert_settings(name, read(name))


def assert_settings(name: str, cfg: Config) -> None:
    assert cfg.custom_imports == dict(imports=['idlevit_mm'], allow_failed_imports=False)
    assert not cfg.auto_scale_lr.enable
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size
    backbone = MODELS.build(cfg.model.backbone)
    assert type(backbone).__name__ == cfg.model.backbone.type
    assert type(backbone).__name__.startswith('Idle')
    if name in POLICIES and '_dense_' not in name:
        # These were found; test_studies.py compares each of them.
        found = '_recipe_' in name or '_larger-images_' in name
        assert found or 0.5 < np.mean(backbone.keep_ratios) < 0.8
    else:
        assert backbone.keep_ratios == [
            pytest.approx(stage) for stage in expected_ratios(name, backbone.depths)
        ]


def test_twins(subtests: pytest.Subtests) -> None:
    """The dense twin differs in keep_ratios alone; the fine-tune starts from the twin's end."""
    for name in SCRATCH:
        with subtests.test(name):
            assert_twins(name)


def assert_twins(name: str) -> None:
    stem = Path(name).stem.removesuffix('_digits')
    sparse = read(name)
    dense = load(f'digit_scenes/{stem}_dense_digits.py')
    finetune = read(f'digit_scenes/{stem}_finetune_digits.py')
    assert dense.model.backbone.keep_ratios == 1.0
    dense.model.backbone.keep_ratios = sparse.model.backbone.keep_ratios
    assert differences(sparse, dense) == {}
    changed = {key.split('.')[0] for key in differences(sparse, finetune)}
    assert changed == {'train_cfg', 'optim_wrapper', 'param_scheduler', 'load_from'}
    assert finetune.load_from == (
        f'work_dirs/{stem}_dense_digits/epoch_{dense.train_cfg.max_epochs}.pth'
    )
    assert finetune.train_cfg.max_epochs < dense.train_cfg.max_epochs
    assert finetune.optim_wrapper.optimizer.lr < dense.optim_wrapper.optimizer.lr
    for cfg in (sparse, dense, finetune):
        # A run that ends between two validations would never test its last weights.
        assert cfg.train_cfg.max_epochs % cfg.train_cfg.val_interval == 0
        assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_epochs


def test_maps_have_the_strides_of_the_heads(subtests: pytest.Subtests) -> None:
    for name in (*SCRATCH, 'coco/mask-rcnn_idle-deit-s_simple-fpn_1x_coco.py'):
        with subtests.test(name):
            cfg = load(name)
            cfg.model.backbone.init_cfg = None
            assert_strides(build(cfg).eval())


def assert_strides(model: torch.nn.Module) -> None:
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 64, 96))
    sizes = [tuple(feature.shape[2:]) for feature in maps]
    expected = []
    if hasattr(model, 'rpn_head'):
        expected.append([stride for stride, _ in model.rpn_head.prior_generator.strides])
        expected.append(model.roi_head.bbox_roi_extractor.featmap_strides)
        expected.append(model.roi_head.mask_roi_extractor.featmap_strides)
    elif hasattr(model, 'bbox_head'):
        expected.append([stride for stride, _ in model.bbox_head.prior_generator.strides])
    else:
        expected.append(getattr(model.decode_head, 'feature_strides', [4, 8, 16, 32]))
    assert len(expected[0]) == len(sizes)
    for strides in expected:
        whole = [(-(-64 // stride), -(-96 // stride)) for stride in strides]
        assert sizes[: len(strides)] == whole


def test_what_decays_in_a_plain_vit(subtests: pytest.Subtests) -> None:
    # ViTDet's decay is its own, and compared with the published.
    for name in (n for n in ALL if is_plain(n) and 'vitdet' not in n):
        with subtests.test(name), Uninitialised():
            assert_decays(name, read(name))


def assert_decays(name: str, cfg: Config) -> None:
    model = build(cfg)
    settings = cfg.optim_wrapper
    groups = build_optim_wrapper(model, settings).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free = {names[id(p)] for group in groups for p in group['params'] if group['weight_decay'] == 0}
    tables = {'backbone.pos_embed', 'backbone.cls_token'}
    norms = {
        f'{name}.{leaf}'
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm))
        for leaf in ('weight', 'bias')
    }
    assert 'backbone.layers.0.ln2.bias' in norms
    # mmseg's recipe frees names with "norm", which a plain ViT has not.
    assert free == (tables if 'ade20k' in name else tables | norms)


@pytest.mark.parametrize('name', SCRATCH)
def test_digit_config_trains_and_tests(name: str, scenes: Path) -> None:
    """One step of training and one of testing on scenes of an odd size."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  mmcv's transforms draw from the global state
    cfg = load(name)
    if cfg.model.type == 'RetinaNet':
        # An untrained focal loss head is sure of nothing.
        cfg.model.test_cfg.score_thr = 0.0
    model = build(cfg)
    model.init_weights()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        sets = {}
        for split in ('train', 'val'):
            loader = cfg[f'{split}_dataloader']
            folder = Path(loader.dataset.data_root).name
            loader.dataset.data_root = str(scenes / folder)
            sets[split] = DATASETS.build(loader.dataset)
        evaluator = cfg.val_evaluator
        if 'ann_file' in evaluator:
            evaluator.ann_file = str(scenes / 'coco' / 'annotations' / 'instances_val.json')
        metric = METRICS.build(evaluator)
        assert (len(sets['train']), len(sets['val'])) == (4, 3)

        model.train()
        batch = pseudo_collate([sets['train'][0], sets['train'][1]])
        data = model.data_preprocessor(batch, True)
        total, logged = model.parse_losses(model(**data, mode='loss'))
        assert torch.isfinite(total)
        assert any('loss' in key and value > 0 for key, value in logged.items())
        total.backward()
        untrained = [
            key
            for key, value in model.backbone.named_parameters()
            if value.grad is None or not torch.isfinite(value.grad).all()
        ]
        assert untrained == []

        model.eval()
        batch = pseudo_collate([sets['val'][0], sets['val'][1], sets['val'][2]])
        with torch.no_grad():
            results = model.test_step(batch)
        assert len(results) == 3
        metric.dataset_meta = sets['val'].metainfo
        metric.process(data_batch=batch, data_samples=[result.to_dict() for result in results])
        assert metric.evaluate(3)


@pytest.mark.parametrize('name', [name for name in POLICIES if '_dense_' not in name])
def test_policy_config_trains(name: str, scenes: Path, tmp_path: Path) -> None:
    """Two steps from a checkpoint, hooks included; what they add is in the log."""
    cfg = load(name)
    stem = Path(name).stem.removesuffix('_digits')
    weights = str(tmp_path / 'dense.pth')
    dense = build(load(f'digit_scenes/{stem.rpartition("_")[0]}_dense_digits.py'))
    torch.save({'state_dict': dense.state_dict()}, weights)
    changes = {
        'load_from': weights,
        'work_dir': str(tmp_path / 'run'),
        'train_cfg.max_epochs': 1,
        'train_dataloader.batch_size': 2,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.dataset.data_root': str(
            scenes / Path(cfg.train_dataloader.dataset.data_root).name
        ),
        'default_hooks.logger.interval': 1,
        # Visualisers are global by name.
        'visualizer.name': f'{stem} of {tmp_path.name}',
    }
    cfg.merge_from_dict(changes)
    for part in ('cfg', 'dataloader', 'evaluator'):
        cfg[f'val_{part}'] = cfg[f'test_{part}'] = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        runner = ResumableRunner.from_cfg(cfg)
        runner.train()
    (log,) = (tmp_path / 'run').rglob('scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert np.isfinite(line['loss'])
        assert set(LOGGED[stem]) <= set(line)
    before = dense.state_dict()
    after = runner.model.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before if 'attn' in key)


def test_data_configs_name_the_written_classes() -> None:
    colours = 'e41a1c 377eb8 4daf4a 984ea3 ff7f00 ffff33 a65628 f781bf 00ced1 99ff33'
    palette = [tuple(bytes.fromhex(colour)) for colour in colours.split()]
    for kind in ('detection', 'instance'):
        cfg = Config.fromfile(CONFIGS / f'_base_/datasets/digit_scenes_{kind}.py')
        assert tuple(cfg.metainfo.classes) == CLASSES
        assert [tuple(colour) for colour in cfg.metainfo.palette] == palette
    cfg = Config.fromfile(CONFIGS / '_base_/datasets/digit_scenes_semantic.py')
    assert tuple(cfg.metainfo.classes) == ('background', *CLASSES)
    assert [tuple(colour) for colour in cfg.metainfo.palette] == [(0, 0, 0), *palette]
