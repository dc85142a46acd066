"""Every config loads and builds; full-size ones are the reference recipes but for idling."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip('mmcv.ops')
mmdet = pytest.importorskip('mmdet')
mmseg = pytest.importorskip('mmseg')

import torch  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope  # noqa: E402

from idlevit_mm.datasets.digit_scenes import (  # noqa: E402
    CLASSES,
    PALETTE,
    SEMANTIC_CLASSES,
    SEMANTIC_PALETTE,
)
from idlevit_mm.engine import ResumableRunner  # noqa: E402

CONFIGS = Path(__file__).parents[1] / 'configs'
ALL = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts
)
DIGITS = [name for name in ALL if name.startswith('digit_scenes/')]
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
    'retinanet_idle-swin_learned': [],
    'retinanet_idle-swin_random-ratios': ['keep_ratio'],
    'retinanet_idle-swin_token-cut': ['loss_token_cut'],
    'retinanet_idle-swin_distill': ['loss_distill_feature'],
    'retinanet_idle-swin_recipe': ['loss_distill_feature'],
    'retinanet_idle-pvtv2_recipe': ['loss_distill_feature'],
    'fpn_idle-pvtv2_recipe': ['loss_distill_feature'],
}
ABSENT = '<absent>'

# What a full-size config changes in its reference: value there, value here.
IDLING = {
    'model.backbone.keep_ratios': (ABSENT, 0.7),
    'model.backbone.policy.scorer': (ABSENT, 'mean_distance'),
    'model.backbone.policy.scope': (ABSENT, 'map'),
}
POWERS = {
    'model.backbone.keep_ratios.type': (ABSENT, 'powers'),
    'model.backbone.keep_ratios.keep_ratio': (ABSENT, 0.7),
    'model.backbone.keep_ratios.first_idle': (ABSENT, 4),
    'model.backbone.policy.type': (ABSENT, 'IdleViT'),
    'model.backbone.policy.scorer': (ABSENT, 'class_query'),
}
# IdleViT's r, r^2, r^3 over the thirds of the blocks that idle, by the depth of a plain ViT.
PLAIN_RATIOS = {
    8: [1.0] * 2 + [0.7] * 2 + [0.7**2] * 2 + [0.7**3] * 2,
    12: [1.0] * 4 + [0.7] * 3 + [0.7**2] * 3 + [0.7**3] * 2,
}
REFERENCES = {
    'coco/mask-rcnn_idle-swin-t_fpn_1x_coco.py': (
        mmdet,
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        {**IDLING, 'model.backbone.type': ('SwinTransformer', 'IdleSwinTransformer')},
    ),
    'coco/retinanet_idle-pvtv2-b2_fpn_1x_coco.py': (
        mmdet,
        'pvt/retinanet_pvtv2-b2_fpn_1x_coco.py',
        {
            **IDLING,
            'model.backbone.type': ('PyramidVisionTransformerV2', 'IdlePyramidVisionTransformerV2'),
            'model.backbone.convert_weights': (ABSENT, True),
            'model.backbone.init_cfg.type': (ABSENT, 'Pretrained'),
        },
    ),
    'ade20k/idle-swin-t_upernet_8xb2-160k_ade20k-512x512.py': (
        mmseg,
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        {
            **IDLING,
            'model.backbone.type': ('SwinTransformer', 'IdleSwinTransformer'),
            'model.backbone.convert_weights': (ABSENT, False),
            'auto_scale_lr.enable': (ABSENT, False),
            'auto_scale_lr.base_batch_size': (ABSENT, 16),
        },
    ),
    # mmdet has no plain ViT; the recipe is that of Swin.
    'coco/mask-rcnn_idle-deit-s_simple-fpn_1x_coco.py': (
        mmdet,
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        {
            'model.neck.type': ('FPN', 'SimpleFeaturePyramid'),
            'model.neck.in_channels': ((96, 192, 384, 768), 384),
            # The neck's default.
            'model.neck.out_channels': (256, ABSENT),
            # Norms of a plain ViT are named ln, so they are told by their kind.
            'optim_wrapper.paramwise_cfg.norm_decay_mult': (ABSENT, 0.0),
            'optim_wrapper.paramwise_cfg.custom_keys.norm.decay_mult': (0.0, ABSENT),
            'optim_wrapper.paramwise_cfg.custom_keys.pos_embed.decay_mult': (ABSENT, 0.0),
            'optim_wrapper.paramwise_cfg.custom_keys.cls_token.decay_mult': (ABSENT, 0.0),
            'optim_wrapper.paramwise_cfg.custom_keys.absolute_pos_embed.decay_mult': (0.0, ABSENT),
            'optim_wrapper.paramwise_cfg.custom_keys.relative_position_bias_table.decay_mult': (
                0.0,
                ABSENT,
            ),
        },
    ),
    'ade20k/idle-deit-s_upernet_8xb2-160k_ade20k-512x512.py': (
        mmseg,
        'vit/vit_deit-s16_upernet_8xb2-160k_ade20k-512x512.py',
        {
            **POWERS,
            'model.backbone.type': ('VisionTransformer', 'IdleVisionTransformer'),
            'model.backbone.convert_weights': (ABSENT, True),
            # The dense class's default, which ours has not.
            'model.backbone.final_norm': (ABSENT, False),
            # It changes BatchNorm only.
            'model.backbone.norm_eval': (False, ABSENT),
            # The reference inherits the 80k recipe, against its name and its published result.
            'train_cfg.max_iters': (80000, 160000),
            'train_cfg.val_interval': (8000, 16000),
            'param_scheduler.1.end': (80000, 160000),
            'default_hooks.checkpoint.interval': (8000, 16000),
            'auto_scale_lr.enable': (ABSENT, False),
            'auto_scale_lr.base_batch_size': (ABSENT, 16),
        },
    ),
    # mmseg has no PVT; its PoolFormer repeats the recipe of Semantic FPN PVT.
    'ade20k/fpn_idle-pvt-s_8xb4-40k_ade20k-512x512.py': (
        mmseg,
        'poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py',
        {
            'optim_wrapper.type': ('AmpOptimWrapper', 'OptimWrapper'),
            'auto_scale_lr.enable': (ABSENT, False),
            'auto_scale_lr.base_batch_size': (ABSENT, 32),
        },
    ),
}
COMPARED = (
    'default_scope',
    'model',
    'optim_wrapper',
    'param_scheduler',
    'train_cfg',
    'val_cfg',
    'test_cfg',
    'train_dataloader',
    'val_dataloader',
    'test_dataloader',
    'val_evaluator',
    'test_evaluator',
    'default_hooks',
    'env_cfg',
    'log_processor',
    'visualizer',
    'tta_pipeline',
    'tta_model',
    'auto_scale_lr',
    'randomness',
)


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


def build(cfg: Config) -> torch.nn.Module:
    if cfg.default_scope == 'mmdet':
        from mmdet.utils import register_all_modules
    else:
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def is_plain(name: str) -> bool:
    return 'idle-vit' in name or 'idle-deit' in name


def expected_ratios(name: str, depths: tuple[int, ...]) -> list[list[float]]:
    if '_dense_' in name:
        return [[1.0] * depth for depth in depths]
    if is_plain(name):
        return [PLAIN_RATIOS[depth] for depth in depths]
    return [[0.7] * depth for depth in depths]


def flat(value: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by dotted key; None counts as not set."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f'{prefix}.{key}' if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (Mapping, list)) for item in value
    ):
        yield f'{prefix}.length', len(value)
        for index, item in enumerate(value):
            yield from flat(item, f'{prefix}.{index}')
    elif value is not None:
        yield prefix, tuple(value) if isinstance(value, (list, tuple)) else value


def differences(
    old: Config, new: Config, keys: tuple[str, ...] = COMPARED
) -> dict[str, tuple[Any, Any]]:
    before = dict(flat({key: old.get(key) for key in keys}))
    after = dict(flat({key: new.get(key) for key in keys}))
    return {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in before.keys() | after.keys()
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    }


def test_all_configs_are_there() -> None:
    expected = {
        f'digit_scenes/{model}{kind}_digits.py'
        for model in MODEL_NAMES
        for kind in ('', '_dense', '_finetune')
    }
    policies = {f'digit_scenes/policies/{name}_digits.py' for name in LOGGED}
    assert set(ALL) == expected | policies | set(REFERENCES)


@pytest.mark.parametrize('name', ALL)
def test_config_builds(name: str) -> None:
    cfg = load(name)
    assert cfg.custom_imports == dict(imports=['idlevit_mm'], allow_failed_imports=False)
    assert not cfg.auto_scale_lr.enable
    model = build(cfg)
    assert type(model.backbone).__name__ == cfg.model.backbone.type
    assert type(model.backbone).__name__.startswith('Idle')
    if name in POLICIES:
        assert 0.5 < np.mean(model.backbone.keep_ratios) < 0.8
    else:
        assert model.backbone.keep_ratios == [
            pytest.approx(stage) for stage in expected_ratios(name, model.backbone.depths)
        ]
    single = cfg.train_dataloader.batch_size
    assert cfg.auto_scale_lr.base_batch_size == (single if name in DIGITS else 8 * single)


@pytest.mark.parametrize('name', REFERENCES)
def test_full_size_recipes_are_the_references(name: str) -> None:
    package, reference, expected = REFERENCES[name]
    path = Path(package.__file__).parent / '.mim' / 'configs' / reference
    if not path.exists():
        pytest.skip(f'{package.__name__} was installed without its configs')
    # The reference may import packages that only its own backbone needs.
    theirs, ours = Config.fromfile(path, import_custom_modules=False), load(name)
    if 'poolformer' in reference:
        # Another backbone, no test-time augmentation, and repetitions of the data set, which an
        # infinite sampler has no use for.
        ours.pop('tta_pipeline')
        ours.pop('tta_model')
        theirs.pop('tta_model')
        theirs.model.pop('backbone')
        ours.model.pop('backbone')
        theirs.train_dataloader.dataset = theirs.train_dataloader.dataset.dataset
    if 'model.neck.type' in expected:
        # Another backbone.
        theirs.model.pop('backbone')
        ours.model.pop('backbone')
    if theirs.model.get('pretrained'):
        # The old place of weights; the reference has them in a file of the same name.
        path = theirs.model.pop('pretrained')
        assert Path(path).name == Path(ours.checkpoint).name
        theirs.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=ours.checkpoint)
    assert differences(theirs, ours) == expected


def test_pvt_small_backbone_is_the_reference() -> None:
    path = Path(mmdet.__file__).parent / '.mim/configs/pvt/retinanet_pvt-s_fpn_1x_coco.py'
    if not path.exists():
        pytest.skip('mmdet was installed without its configs')
    theirs = Config.fromfile(path)
    ours = load('ade20k/fpn_idle-pvt-s_8xb4-40k_ade20k-512x512.py')
    assert differences(theirs.model, ours.model, ('backbone',)) == {
        'backbone.type': ('PyramidVisionTransformer', 'IdlePyramidVisionTransformer'),
        'backbone.keep_ratios': (ABSENT, 0.7),
        'backbone.policy.scorer': (ABSENT, 'mean_distance'),
        'backbone.policy.scope': (ABSENT, 'map'),
        'backbone.convert_weights': (ABSENT, True),
        'backbone.init_cfg.type': (ABSENT, 'Pretrained'),
    }


@pytest.mark.parametrize('name', SCRATCH)
def test_twins(name: str) -> None:
    """The dense twin differs in keep_ratios alone; the fine-tune starts from the twin's end."""
    stem = Path(name).stem.removesuffix('_digits')
    sparse = load(name)
    dense = load(f'digit_scenes/{stem}_dense_digits.py')
    finetune = load(f'digit_scenes/{stem}_finetune_digits.py')
    assert dense.model.backbone.keep_ratios == 1.0
    dense.model.backbone.keep_ratios = sparse.model.backbone.keep_ratios
    assert differences(sparse, dense) == {}
    changed = {key.split('.')[0] for key in differences(sparse, finetune)}
    assert changed == {'train_cfg', 'optim_wrapper', 'param_scheduler'}
    assert finetune.load_from == (
        f'work_dirs/{stem}_dense_digits/epoch_{dense.train_cfg.max_epochs}.pth'
    )
    assert finetune.train_cfg.max_epochs < dense.train_cfg.max_epochs
    assert finetune.optim_wrapper.optimizer.lr < dense.optim_wrapper.optimizer.lr
    for cfg in (sparse, dense, finetune):
        # A run that ends between two validations would never test its last weights.
        assert cfg.train_cfg.max_epochs % cfg.train_cfg.val_interval == 0
        assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_epochs


@pytest.mark.parametrize('name', SCRATCH)
@pytest.mark.parametrize(
    ('option', 'expected'),
    [('0.5', [0.5] * 4), ('[0.9,0.8,0.6,1.0]', [0.9, 0.8, 0.6, 1.0])],
)
def test_keep_ratios_from_the_command_line(name: str, option: str, expected: list[float]) -> None:
    if is_plain(name):
        # One stage.
        option, expected = ('[0.9]' if '[' in option else option), expected[:1]
    cfg = load(name)
    cfg.merge_from_dict({'model.backbone.keep_ratios': DictAction._parse_iterable(option)})
    model = build(cfg)
    assert [set(stage) for stage in model.backbone.keep_ratios] == [{r} for r in expected]


STRIDED = [*SCRATCH, 'coco/mask-rcnn_idle-deit-s_simple-fpn_1x_coco.py']


@pytest.mark.parametrize('name', STRIDED)
def test_maps_have_the_strides_of_the_heads(name: str) -> None:
    cfg = load(name)
    cfg.model.backbone.init_cfg = None
    model = build(cfg).eval()
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


@pytest.mark.parametrize('name', [name for name in ALL if is_plain(name)])
def test_what_decays_in_a_plain_vit(name: str) -> None:
    cfg = load(name)
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


@pytest.mark.parametrize('name', POLICIES)
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
    if 'loss_distill_feature' in LOGGED[stem]:
        changes['custom_hooks.0.losses.0.teacher.checkpoint'] = weights
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
    for kind in ('detection', 'instance'):
        cfg = Config.fromfile(CONFIGS / f'_base_/datasets/digit_scenes_{kind}.py')
        assert tuple(cfg.metainfo.classes) == CLASSES
        assert [tuple(colour) for colour in cfg.metainfo.palette] == list(PALETTE)
    cfg = Config.fromfile(CONFIGS / '_base_/datasets/digit_scenes_semantic.py')
    assert tuple(cfg.metainfo.classes) == SEMANTIC_CLASSES
    assert [tuple(colour) for colour in cfg.metainfo.palette] == list(SEMANTIC_PALETTE)
