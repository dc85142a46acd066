"""Recipes for COCO and ADE20K: the reference's but for what is listed, and all of them build."""

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from config_zoo import (
    ABSENT,
    ALL,
    CONFIGS,
    MIRROR,
    SERVER,
    Uninitialised,
    build,
    differences,
    load,
    load_reference,
    mmdet,
    mmseg,
    read,
    shipped,
)
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    MODELS,
    PARAM_SCHEDULERS,
    VISUALIZERS,
    DefaultScope,
)
from mmengine.utils import import_modules_from_strings

IDLING = {
    'model.backbone.keep_ratios': (ABSENT, 1.0),
    'model.backbone.policy.scorer': (ABSENT, 'mean_distance'),
    'model.backbone.policy.scope': (ABSENT, 'map'),
}
SWIN = {**IDLING, 'model.backbone.type': ('SwinTransformer', 'IdleSwinTransformer')}
# The references name the file alone; official releases have other names than OpenMMLab.
OFFICIAL_WEIGHTS = {
    'model.backbone.convert_weights': (ABSENT, True),
    'model.backbone.init_cfg.type': (ABSENT, 'Pretrained'),
}
PVT = {
    **IDLING,
    **OFFICIAL_WEIGHTS,
    'model.backbone.type': ('PyramidVisionTransformer', 'IdlePyramidVisionTransformer'),
}
PVTV2 = {
    **IDLING,
    **OFFICIAL_WEIGHTS,
    'model.backbone.type': ('PyramidVisionTransformerV2', 'IdlePyramidVisionTransformerV2'),
}
MIT = {**IDLING, 'model.backbone.type': ('MixVisionTransformer', 'IdleMixVisionTransformer')}
# These weights have OpenMMLab's names; mmseg's classes cannot convert others.
OPENMMLAB_WEIGHTS = {'model.backbone.convert_weights': (ABSENT, False)}


def scaling(batch: int) -> dict[str, tuple[Any, Any]]:
    """mmseg's recipes do not say what batch size their learning rate is for."""
    return {
        'auto_scale_lr.enable': (ABSENT, False),
        'auto_scale_lr.base_batch_size': (ABSENT, batch),
    }


SWIN_B_WEIGHTS = (
    'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
    'swin_base_patch4_window7_224.pth'
)


def mask_rcnn(size: str, schedule: str) -> Config:
    """mmdet has no Swin-S for 1x: that is Swin-T's recipe with Swin-S's backbone.

    And no Swin-B: that is Swin-S's recipe with the backbone that Swin's authors detect with.
    """
    if size == 'b':
        cfg = mask_rcnn('s', schedule)
        cfg.model.backbone.update(
            embed_dims=128,
            num_heads=[4, 8, 16, 32],
            drop_path_rate=0.3,
            init_cfg=dict(type='Pretrained', checkpoint=SWIN_B_WEIGHTS),
        )
        cfg.model.neck.in_channels = [128, 256, 512, 1024]
        return cfg
    if (size, schedule) == ('s', '1x'):
        cfg = mask_rcnn('t', '1x')
        cfg.model.backbone = mask_rcnn('s', 'amp-ms-crop-3x').model.backbone
        return cfg
    return load_reference(mmdet, f'swin/mask-rcnn_swin-{size}-p4-w7_fpn_{schedule}_coco.py')


def cascade_mask_rcnn(size: str, schedule: str) -> Config:
    """mmdet has none with Swin: Mask R-CNN's recipe with the heads of Cascade Mask R-CNN R-50."""
    cfg = mask_rcnn(size, schedule)
    model = load_reference(mmdet, 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py').model
    cfg.model = {**model, 'backbone': cfg.model.backbone, 'neck': cfg.model.neck}
    return cfg


def retinanet(backbone: str) -> Config:
    return load_reference(mmdet, f'pvt/retinanet_{backbone}_fpn_1x_coco.py')


def dino_large() -> Config:
    return load_reference(mmdet, 'dino/dino-5scale_swin-l_8xb2-12e_coco.py')


def dino() -> Config:
    """mmdet has DINO with Swin-L on five scales: here R-50's on four, Swin-T from Mask R-CNN's."""
    cfg = load_reference(mmdet, 'dino/dino-4scale_r50_8xb2-12e_coco.py')
    cfg.model.backbone = mask_rcnn('t', '1x').model.backbone
    return cfg


def upernet(size: str) -> Config:
    windows = 'window12-in22k-384x384' if size == 'large' else 'window7-in1k'
    return load_reference(
        mmseg, f'swin/swin-{size}-patch4-{windows}-pre_upernet_8xb2-160k_ade20k-512x512.py'
    )


def semantic_fpn(backbone: str) -> Config:
    """mmseg has no PVT, but its PoolFormer repeats PVT's recipe; the backbone is RetinaNet's."""
    cfg = load_reference(mmseg, 'poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py')
    model = retinanet(backbone).model
    cfg.model.backbone = model.backbone
    cfg.model.neck.in_channels = model.neck.in_channels
    # Repetitions of the data set, which an infinite sampler has no use for.
    cfg.train_dataloader.dataset = cfg.train_dataloader.dataset.dataset
    # It has a model for test-time augmentation, but no pipeline.
    cfg.tta_pipeline = load_reference(mmseg, '_base_/datasets/ade20k.py').tta_pipeline
    return cfg


def mask2former() -> Config:
    return load_reference(mmseg, 'mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py')


def segformer(size: str) -> Config:
    return load_reference(mmseg, f'segformer/segformer_mit-{size}_8xb2-160k_ade20k-512x512.py')


class Recipe(NamedTuple):
    """A dense recipe.

    Attributes:
        reference: Makes the settings that it repeats.
        expected: Where it differs from them: value there, value here.
        published: Package, metafile and name of the reference's weights, if there are any.
    """

    reference: Callable[[], Config]
    expected: Mapping[str, tuple[Any, Any]]
    published: tuple[Any, str, str] | None = None


RECIPES: dict[str, Recipe] = {}
for size in ('t', 's', 'b'):
    for schedule in ('1x', 'amp-ms-crop-3x')[size == 'b' :]:
        published = (
            None
            if (size, schedule) == ('s', '1x') or size == 'b'
            else (mmdet, 'swin/metafile.yml', f'mask-rcnn_swin-{size}-p4-w7_fpn_{schedule}_coco')
        )
        RECIPES[f'coco/mask_rcnn/mask-rcnn_idle-swin-{size}_fpn_{schedule}-dense_coco.py'] = Recipe(
            lambda size=size, schedule=schedule: mask_rcnn(size, schedule), SWIN, published
        )
        RECIPES[
            f'coco/cascade_mask_rcnn/'
            f'cascade-mask-rcnn_idle-swin-{size}_fpn_{schedule}-dense_coco.py'
        ] = Recipe(lambda size=size, schedule=schedule: cascade_mask_rcnn(size, schedule), SWIN)
for backbone in ('pvt-t', 'pvt-s', *(f'pvtv2-b{number}' for number in range(6))):
    idling = PVTV2 if 'v2' in backbone else PVT
    RECIPES[f'coco/retinanet/retinanet_idle-{backbone}_fpn_1x-dense_coco.py'] = Recipe(
        lambda backbone=backbone: retinanet(backbone),
        idling,
        (mmdet, 'pvt/metafile.yml', f'retinanet_{backbone}_fpn_1x_coco'),
    )
    if backbone[-2:] in ('b3', 'b4', 'b5'):
        continue
    RECIPES[f'ade20k/semantic_fpn/fpn_idle-{backbone}_8xb4-40k-dense_ade20k-512x512.py'] = Recipe(
        lambda backbone=backbone: semantic_fpn(backbone),
        # PVT trains in full precision.
        {**idling, **scaling(32), 'optim_wrapper.type': ('AmpOptimWrapper', 'OptimWrapper')},
    )
RECIPES['coco/dino/dino-4scale_idle-swin-t_8xb2-12e-dense_coco.py'] = Recipe(
    dino,
    {
        **SWIN,
        'model.backbone.out_indices': ((0, 1, 2, 3), (1, 2, 3)),
        'model.neck.in_channels': ((512, 1024, 2048), (192, 384, 768)),
        'auto_scale_lr.enable': (ABSENT, False),
    },
)
RECIPES['coco/dino/dino-5scale_idle-swin-l_8xb2-12e-dense_coco.py'] = Recipe(
    dino_large,
    {**SWIN, 'auto_scale_lr.enable': (ABSENT, False)},
    (mmdet, 'dino/metafile.yml', 'dino-5scale_swin-l_8xb2-12e_coco'),
)
for letter, size in (('t', 'tiny'), ('s', 'small'), ('b', 'base'), ('l', 'large')):
    RECIPES[f'ade20k/upernet/idle-swin-{letter}_upernet_8xb2-160k-dense_ade20k-512x512.py'] = (
        Recipe(
            lambda size=size: upernet(size),
            {**SWIN, **OPENMMLAB_WEIGHTS, **scaling(16)},
            (
                mmseg,
                'swin/metafile.yaml',
                f'swin-{size}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512',
            )
            if size != 'large'
            else None,
        )
    )
RECIPES['ade20k/mask2former/mask2former_idle-swin-t_8xb2-160k-dense_ade20k-512x512.py'] = Recipe(
    mask2former,
    {**SWIN, **OPENMMLAB_WEIGHTS},
    (mmseg, 'mask2former/metafile.yaml', 'mask2former_swin-t_8xb2-160k_ade20k-512x512'),
)
LARGE = 'mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640'
RECIPES['ade20k/mask2former/mask2former_idle-swin-l_8xb2-160k-dense_ade20k-640x640.py'] = Recipe(
    lambda: load_reference(mmseg, f'mask2former/{LARGE}.py'),
    {**SWIN, **OPENMMLAB_WEIGHTS},
    (mmseg, 'mask2former/metafile.yaml', LARGE),
)
for size in (f'b{number}' for number in range(6)):
    RECIPES[f'ade20k/segformer/segformer_idle-mit-{size}_8xb2-160k-dense_ade20k-512x512.py'] = (
        Recipe(
            lambda size=size: segformer(size),
            {**MIT, **OPENMMLAB_WEIGHTS, **scaling(16)},
            (mmseg, 'segformer/metafile.yaml', f'segformer_mit-{size}_8xb2-160k_ade20k-512x512'),
        )
    )


def vitdet() -> Config:
    """What mmdet's project ViTDet resolves to, which the wheel lacks: its changes to what it has.

    Its constructor of optimisers is the project's own: test_rates_of_vitdet is about what it does.
    """
    cfg = load_reference(mmdet, 'common/lsj-100e_coco-instance.py')
    cfg.model = load_reference(mmdet, '_base_/models/mask-rcnn_r50_fpn.py').model
    size, norm = (1024, 1024), dict(type='LN2d', requires_grad=True)
    pad = dict(type='Pad', size=size, pad_val=dict(img=(114, 114, 114)))
    load_image, annotations, resize, crop, keep, flip, pack = (
        cfg.train_dataloader.dataset.dataset.pipeline
    )
    cfg.train_dataloader.dataset = cfg.train_dataloader.dataset.dataset
    cfg.train_dataloader.update(batch_size=4, num_workers=8)
    cfg.train_dataloader.dataset.pipeline = [
        *(load_image, annotations, flip, resize, crop, keep, pad, pack)
    ]
    load_image, _, *rest = cfg.val_dataloader.dataset.pipeline
    resize = dict(type='Resize', scale=size, keep_ratio=True)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline = [load_image, resize, pad, *rest]
    batch_augments = [dict(type='BatchFixedSizePad', size=size, pad_mask=True)]
    cfg.model.data_preprocessor.update(pad_size_divisor=32, batch_augments=batch_augments)
    cfg.model.backbone = dict(
        type='ViT',
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        norm_cfg=dict(type='LN', requires_grad=True),
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        use_rel_pos=True,
        init_cfg=dict(type='Pretrained', checkpoint='mae_pretrain_vit_base.pth'),
    )
    cfg.model.neck = dict(
        type='SimpleFPN',
        backbone_channel=768,
        in_channels=[192, 384, 768, 768],
        out_channels=256,
        num_outs=5,
        norm_cfg=norm,
    )
    cfg.model.rpn_head.num_convs = 2
    four = dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm)
    cfg.model.roi_head.bbox_head.update(four)
    cfg.model.roi_head.mask_head.norm_cfg = norm
    cfg.optim_wrapper = dict(
        type='AmpOptimWrapper',
        paramwise_cfg=load(VITDET).optim_wrapper.paramwise_cfg,
        optimizer=dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.1),
    )
    warmup = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250)
    steps = dict(type='MultiStepLR', begin=0, end=184375, by_epoch=False, gamma=0.1)
    cfg.param_scheduler = [warmup, dict(steps, milestones=[163889, 177546])]
    loop = dict(type='IterBasedTrainLoop', max_iters=184375, val_interval=5000)
    cfg.train_cfg = dict(loop, dynamic_intervals=[(180001, 184375)])
    saved = dict(by_epoch=False, save_last=True, interval=5000, max_keep_ckpts=5)
    cfg.default_hooks.checkpoint.update(saved)
    cfg.log_processor.by_epoch = False
    return cfg


VITDET = 'coco/mask_rcnn/mask-rcnn_idle-vitdet-b_simple-fpn_lsj-100e-dense_coco.py'
RECIPES[VITDET] = Recipe(
    vitdet,
    {
        **IDLING,
        'model.backbone.type': ('ViT', 'IdleViTDet'),
        'model.backbone.embed_dim': (768, ABSENT),
        'model.backbone.embed_dims': (ABSENT, 768),
        'model.backbone.depth': (12, ABSENT),
        'model.backbone.num_layers': (ABSENT, 12),
        # The dense class's default.
        'model.backbone.pretrain_img_size': (ABSENT, 224),
        'model.backbone.convert_weights': (ABSENT, True),
        # The project wants the file beside it.
        'model.backbone.init_cfg.checkpoint': (
            'mae_pretrain_vit_base.pth',
            'https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth',
        ),
        'model.neck.type': ('SimpleFPN', 'SimpleFeaturePyramid'),
        'model.neck.backbone_channel': (768, ABSENT),
        'model.neck.in_channels': ((192, 384, 768, 768), 768),
        'auto_scale_lr.enable': (ABSENT, False),
    },
)


def test_rates_of_vitdet() -> None:
    """0.7 to the power of the blocks above, and no decay of norms, biases and positions."""
    cfg = load(VITDET)
    with Uninitialised():
        model = build(cfg)
    settings = dict(cfg.optim_wrapper, type='OptimWrapper')
    with DefaultScope.overwrite_default_scope('mmdet'):
        groups = build_optim_wrapper(model, settings).optimizer.param_groups
    found = {id(group['params'][0]): (group['lr'], group['weight_decay']) for group in groups}
    for name, parameter in model.named_parameters():
        above = 0
        if name.startswith('backbone.'):
            block = name.split('.')[2] if '.layers.' in name else -1
            above = 12 - int(block)
        free = parameter.ndim == 1 or 'pos_embed' in name
        expected = (1e-4 * 0.7**above, 0.0 if free else 0.1)
        assert found[id(parameter)] == pytest.approx(expected), name


# Keep 0.7 from the weights of the backbone alone: the dense recipe with this one difference.
FROM_BACKBONE = {
    'coco/mask-rcnn_idle-swin-t_fpn_1x_coco.py': (
        'coco/mask_rcnn/mask-rcnn_idle-swin-t_fpn_1x-dense_coco.py'
    ),
    'coco/retinanet_idle-pvtv2-b2_fpn_1x_coco.py': (
        'coco/retinanet/retinanet_idle-pvtv2-b2_fpn_1x-dense_coco.py'
    ),
    'ade20k/idle-swin-t_upernet_8xb2-160k_ade20k-512x512.py': (
        'ade20k/upernet/idle-swin-t_upernet_8xb2-160k-dense_ade20k-512x512.py'
    ),
    'ade20k/fpn_idle-pvt-s_8xb4-40k_ade20k-512x512.py': (
        'ade20k/semantic_fpn/fpn_idle-pvt-s_8xb4-40k-dense_ade20k-512x512.py'
    ),
}


def mask_rcnn_deit() -> Config:
    """mmdet has no plain ViT; the recipe is that of Swin."""
    cfg = mask_rcnn('t', '1x')
    cfg.model.pop('backbone')
    return cfg


def upernet_deit() -> Config:
    cfg = load_reference(mmseg, 'vit/vit_deit-s16_upernet_8xb2-160k_ade20k-512x512.py')
    # The old place of weights, which names a file; ours is the address of the one of that name.
    ours = load('ade20k/idle-deit-s_upernet_8xb2-160k_ade20k-512x512.py').checkpoint
    assert Path(cfg.model.pop('pretrained')).name == Path(ours).name
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=ours)
    return cfg


PLAIN: dict[str, Recipe] = {
    'coco/mask-rcnn_idle-deit-s_simple-fpn_1x_coco.py': Recipe(
        mask_rcnn_deit,
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
    'ade20k/idle-deit-s_upernet_8xb2-160k_ade20k-512x512.py': Recipe(
        upernet_deit,
        {
            'model.backbone.type': ('VisionTransformer', 'IdleVisionTransformer'),
            'model.backbone.keep_ratios.type': (ABSENT, 'powers'),
            'model.backbone.keep_ratios.keep_ratio': (ABSENT, 0.7),
            'model.backbone.keep_ratios.first_idle': (ABSENT, 4),
            'model.backbone.idle_where': (ABSENT, 'pays'),
            'model.backbone.policy.type': (ABSENT, 'IdleViT'),
            'model.backbone.policy.scorer': (ABSENT, 'class_query'),
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
            **scaling(16),
        },
    ),
}
# IdleViT's r, r^2, r^3 over the thirds of the blocks that idle.
PLAIN_RATIOS = [1.0] * 4 + [0.7] * 3 + [0.7**2] * 3 + [0.7**3] * 2

MODES = ('dense', 'keep70', 'keep50', 'random')
FULL_SIZE = [name for name in ALL if name.startswith(('coco/', 'ade20k/'))]


def mode_of(dense: str, mode: str) -> str:
    """Name of a recipe's config for a mode."""
    return dense.replace('-dense_', f'-{mode}_')


def test_all_recipes_are_there() -> None:
    families = {mode_of(name, mode) for name in RECIPES for mode in MODES}
    assert len(RECIPES) == 38
    assert set(FULL_SIZE) == families | set(FROM_BACKBONE) | set(PLAIN)


def test_bases_are_shipped_here() -> None:
    """`mmdet::` needs setuptools below 82 with mmengine; with its fork, `mmseg::` finds nothing."""
    for path in CONFIGS.rglob('*.py'):
        assert not re.search(r'\w::\w', path.read_text(encoding='utf-8')), path


def test_recipes_are_the_references(subtests: pytest.Subtests) -> None:
    for name, (reference, expected, _) in {**RECIPES, **PLAIN}.items():
        with subtests.test(name):
            theirs, ours = reference(), load(name)
            if 'backbone' not in theirs.model:
                ours.model.pop('backbone')
            assert differences(theirs, ours) == expected


# All blocks but the first.
RATIOS = {'model.backbone.keep_ratios': (1.0, ABSENT)} | {
    f'model.backbone.keep_ratios.{key}': (ABSENT, value)
    for key, value in dict(type='powers', keep_ratio=0.7, first_idle=1, groups=1).items()
}


def test_training_from_the_backbones_weights_changes_the_ratio_alone() -> None:
    for name, dense in FROM_BACKBONE.items():
        changed = RATIOS | {'model.backbone.idle_where': (ABSENT, 'pays')}
        assert differences(read(dense), read(name)) == changed, name


def test_what_fine_tuning_changes(subtests: pytest.Subtests) -> None:
    for dense in RECIPES:
        with subtests.test(dense):
            assert_fine_tuning(read(dense), read(mode_of(dense, 'keep70')))


def assert_fine_tuning(before: Config, after: Config) -> None:
    changes = differences(before, after)
    assert {key: changes.pop(key) for key in RATIOS} == RATIOS
    assert changes.pop('model.backbone.idle_where') == (ABSENT, 'pays')
    assert changes.pop('model.backbone.policy.type') == (ABSENT, 'EvoViT')
    # All weights come with load_from.
    weights = before.model.backbone.init_cfg.checkpoint
    assert changes.pop('model.backbone.init_cfg.checkpoint') == (weights, ABSENT)
    assert changes.pop('model.backbone.init_cfg.type') == ('Pretrained', ABSENT)
    assert changes.pop('load_from') == (ABSENT, after.load_from)
    rate, lower = changes.pop('optim_wrapper.optimizer.lr')
    assert lower == pytest.approx(0.3 * rate)

    by_epoch = before.train_cfg.type == 'EpochBasedTrainLoop'
    length, shorter = changes.pop(f'train_cfg.max_{"epochs" if by_epoch else "iters"}')
    assert 0.3 <= shorter / length <= 1 / 3
    scheduled = {key for key in changes if key.startswith('param_scheduler.')}
    warmup, cosine = after.param_scheduler
    assert (warmup.type, warmup.end, warmup.by_epoch) == ('LinearLR', 500, False)
    assert (cosine.type, cosine.end, cosine.by_epoch) == ('CosineAnnealingLR', shorter, by_epoch)
    for key in scheduled:
        del changes[key]
    # What is trained last is evaluated and kept.
    evaluated = {'train_cfg.val_interval', 'default_hooks.checkpoint.interval'} & changes.keys()
    for key in evaluated:
        del changes[key]
    if dynamic := changes.pop('train_cfg.dynamic_intervals', None):
        # The last iteration is evaluated and kept, whatever the intervals.
        ((_, interval),), _ = dynamic
        assert interval == length
        length -= length % before.train_cfg.val_interval
    for cfg, end in ((before, length), (after, shorter)):
        assert end % cfg.train_cfg.val_interval == 0
        assert end % cfg.default_hooks.checkpoint.interval == 0

    distilled = {key for key in changes if key.startswith('custom_hooks.')}
    assert 'custom_hooks' not in before
    assert after.custom_hooks == [
        dict(
            type='AuxiliaryLossHook',
            # Without a teacher of its own: load_from is it.
            losses=[dict(type='FeatureDistillation', loss_weight=5.0)],
        )
    ]
    assert changes.keys() == distilled


def test_what_the_other_modes_change(subtests: pytest.Subtests) -> None:
    for dense in RECIPES:
        with subtests.test(dense):
            base = read(mode_of(dense, 'keep70'))
            assert differences(base, read(mode_of(dense, 'keep50'))) == {
                'model.backbone.keep_ratios.keep_ratio': (0.7, 0.5)
            }
            random = load(mode_of(dense, 'random'))
            drawing, distilling = random.custom_hooks
            assert drawing == dict(type='RandomKeepRatioHook', low=0.3, high=1.0, sandwich=True)
            assert [distilling] == base.custom_hooks
            random.custom_hooks = base.custom_hooks
            assert differences(base, random) == {}


def test_fine_tuning_starts_from_the_published_weights(subtests: pytest.Subtests) -> None:
    for dense, recipe in RECIPES.items():
        with subtests.test(dense):
            assert read(mode_of(dense, 'keep70')).load_from == dense_weights(dense, recipe)


def dense_weights(dense: str, recipe: Recipe) -> str:
    """Address of the published weights; where there are none, what our own recipe ends with."""
    if recipe.published is None:
        loop = read(dense).train_cfg
        by_epoch = 'max_epochs' in loop
        end = f'epoch_{loop.max_epochs}' if by_epoch else f'iter_{loop.max_iters}'
        return f'work_dirs/{Path(dense).stem}/{end}.pth'
    package, metafile, model = recipe.published
    index = Config.fromfile(shipped(package, f'configs/{metafile}'))
    (entry,) = (entry for entry in index.Models if entry.Name == model)
    return entry.Weights.replace(MIRROR, SERVER)


def test_recipe_builds(subtests: pytest.Subtests) -> None:
    for name in (*RECIPES, *PLAIN):
        with subtests.test(name):
            assert_recipe_builds(name)


def assert_recipe_builds(name: str) -> None:
    """Model, optimiser with its groups, schedulers, hooks, metrics, data sets and pipelines.

    Dense, and with all that fine-tuning adds: the other modes differ from these in numbers alone.
    """
    cfg = load(name)
    import_modules_from_strings(**cfg.custom_imports)
    with Uninitialised():
        model = build(cfg)
    if name in PLAIN:
        assert model.backbone.keep_ratios == [pytest.approx(PLAIN_RATIOS)]
    assert_builds(name, cfg, model)
    if name in PLAIN:
        return
    name = mode_of(name, 'random')
    cfg = load(name)
    with Uninitialised():
        model.backbone = MODELS.build(cfg.model.backbone)
    ratios = [[0.7] * depth for depth in model.backbone.depths]
    ratios[0][0] = 1.0
    assert model.backbone.keep_ratios == [pytest.approx(stage) for stage in ratios]
    assert_builds(name, cfg, model)


def assert_builds(name: str, cfg: Config, model: torch.nn.Module) -> None:
    assert type(model.backbone).__name__ == cfg.model.backbone.type
    assert type(model.backbone).__name__.startswith('Idle')
    assert not cfg.auto_scale_lr.enable
    gpus = 16 if 'vitdet' in name else 8
    assert cfg.auto_scale_lr.base_batch_size == gpus * cfg.train_dataloader.batch_size
    settings = copy.deepcopy(cfg.optim_wrapper)
    if settings.type == 'AmpOptimWrapper' and not torch.cuda.is_available():
        # mmengine builds it on accelerators only.
        settings.type = 'OptimWrapper'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        wrapper = build_optim_wrapper(model, settings)
        optimised = [id(p) for group in wrapper.optimizer.param_groups for p in group['params']]
        assert sorted(optimised) == sorted(id(p) for p in model.parameters())
        for scheduler in copy.deepcopy(cfg.param_scheduler):
            converts = scheduler.pop('convert_to_iter_based', False)
            builder = PARAM_SCHEDULERS.get(scheduler.pop('type'))
            if converts:
                builder.build_iter_from_epoch(optimizer=wrapper, epoch_length=10, **scheduler)
            else:
                builder(wrapper, **scheduler)
        # Hooks ask for the visualiser, and visualisers are global by name.
        VISUALIZERS.build({**cfg.visualizer, 'name': name})
        for hook in [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]:
            HOOKS.build(hook)
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            # mmdet's reads its file at once.
            METRICS.build({k: v for k, v in evaluator.items() if k != 'ann_file'})
        for phase in ('train', 'val', 'test'):
            DATASETS.build({**cfg[f'{phase}_dataloader'].dataset, 'lazy_init': True})
