"""The config swap: configs that ship with mmdet and mmseg, users' own, and what is refused."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS

from idlevit_mm.engine.launch import run_tool
from idlevit_mm.engine.swap import (
    Settings,
    differences,
    idle_config,
    parse_keep,
    write_idle_config,
)
from idlevit_mm.errors import UsageError

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

IMPORTS = {'imports': ['idlevit_mm'], 'allow_failed_imports': False}
KEEP = Settings(keep=0.7)

SHIPPED = {
    'mmdet': {
        'SwinTransformer': [
            'dino/dino-5scale_swin-l_8xb2-12e_coco.py',
            'glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py',
            'mask2former_vis/mask2former_swin-l-p4-w12-384-in21k_8xb2-8e_youtubevis2021.py',
            'mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py',
            'rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco.py',
            'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
            'v3det/fcos_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x.py',
        ],
        'PyramidVisionTransformer': [
            'pvt/retinanet_pvt-t_fpn_1x_coco.py',
        ],
        'PyramidVisionTransformerV2': [
            'pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
        ],
    },
    'mmseg': {
        'SwinTransformer': [
            'mask2former/mask2former_swin-s_8xb2-160k_ade20k-512x512.py',
            'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
            'swin/swin-tiny-patch4-window7_upernet_1xb8-20k_levir-256x256.py',
        ],
        'MixVisionTransformer': [
            'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        ],
        'VisionTransformer': [
            'vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py',
            'vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
            'dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py',
            'segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
        ],
    },
}
CASES = [
    (package, dense, name)
    for package, kinds in SHIPPED.items()
    for dense, names in kinds.items()
    for name in names
]
TWIN_OUTPUTS = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py',
    'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py',
    'mmseg::twins/twins_svt-s_uperhead_8xb2-160k_ade20k-512x512.py',
]
REFUSED = [
    ('mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py', 'model.backbone is mmseg.BEiT'),
    ('mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py', 'is mmseg.MAE'),
    ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', 'model.backbone is mmdet.ResNet'),
    (
        'mmseg::san/san-vit-b16_coco-stuff164k-640x640.py',
        r'model\.image_encoder \(mmseg\.VisionTransformer\): .* has no patch_pad=0',
    ),
    (
        'mmseg::setr/setr_vit-l_mla_8xb2-160k_ade20k-512x512.py',
        r'other weights than IdleVisionTransformer: cls_token is \(1, 1, 1024\), not absent',
    ),
]


def shipped(name):
    package, _, path = name.partition('::')
    root = importlib.util.find_spec(package).submodule_search_locations[0]
    return Path(root, '.mim', 'configs', path)


def resolved(path):
    return Config.fromfile(path).to_dict()


def swin(kind='SwinTransformer', **more):
    """Source of a small backbone."""
    small = dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=4)
    return repr(dict(type=kind, **small, **more))


@pytest.fixture
def write(tmp_path):
    """Writes a user's config and returns its path."""

    def write_file(text, name='mine.py'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def only_the_backbone_changes(name, dense, out):
    swapped = idle_config(name, KEEP, str(out), force=True)
    first, second = Config.fromfile(shipped(name)), Config.fromfile(swapped.file)
    changed = differences(first.to_dict(), second.to_dict())

    assert changed == swapped.changed
    assert changed.pop('model.backbone.type') == (dense, f'Idle{dense}')
    assert changed.pop('model.backbone.keep_ratios') == ('(none)', 0.7)
    before, after = (cfg.to_dict().get('custom_imports', {}) for cfg in (first, second))
    named = before.get('imports', [])
    named = [named] if isinstance(named, str) else named
    assert after == {**IMPORTS, **before, 'imports': [*named, 'idlevit_mm']}
    changed = {key: pair for key, pair in changed.items() if not key.startswith('custom_imports')}
    given = first.model.backbone
    for key, (old, new) in changed.items():
        assert dense == 'VisionTransformer'
        argument = key.removeprefix('model.backbone.')
        if new == '(none)':
            assert (argument, old) == ('norm_eval', False)
        else:
            assert old == '(none)'
            assert argument not in given
    text = swapped.file.read_text()
    assert len(text.splitlines()) <= 15
    assert all('/' not in line.replace('tools/', '') for line in text.splitlines() if '#' in line)


@pytest.mark.usefixtures('layout')
def test_shipped_configs_differ_in_nothing_but_their_backbones(tmp_path):
    for package, dense, name in CASES:
        only_the_backbone_changes(f'{package}::{name}', dense, tmp_path / 'idle.py')
    assert [path.name for path in tmp_path.iterdir()] == ['idle.py'], 'no draft stays behind'


@pytest.mark.parametrize('name', TWIN_OUTPUTS)
def test_twin_takes_the_dense_weights_and_computes_the_same(name, tmp_path):
    swapped = idle_config(name, Settings(keep=1.0), str(tmp_path / 'idle.py'))
    before, after = Config.fromfile(shipped(name)), Config.fromfile(swapped.file)
    with MODELS.switch_scope_and_registry(before.default_scope):
        dense, idle = (
            MODELS.build({**cfg.model.backbone, 'init_cfg': None}) for cfg in (before, after)
        )
    dense.eval(), idle.eval()
    assert type(dense).__name__ != type(idle).__name__
    idle.load_state_dict(dense.state_dict(), strict=True)
    image = torch.randn(1, 3, 75, 101)
    with torch.no_grad():
        outputs = list(zip(dense(image), idle(image), strict=True))
    for theirs, ours in outputs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


# The arguments of mmdet's project ViTDet, which the wheel lacks, and its names of weights.
VITDET_PROJECT = """
import torch
from mmdet.registry import MODELS
from idlevit_mm.backbones import IdleViTDet
from idlevit_mm.converters import convert_weights


@MODELS.register_module(force=True)
class ViT(torch.nn.Module):
    def __init__(self, img_size=1024, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, use_abs_pos=True, use_rel_pos=False, window_size=0,
                 window_block_indexes=(0, 1), pretrain_img_size=224, pretrain_use_cls_token=True,
                 init_cfg=None):
        super().__init__()
        self.twin = IdleViTDet(
            img_size=img_size, patch_size=patch_size, in_channels=in_chans, embed_dims=embed_dim,
            num_layers=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, use_rel_pos=use_rel_pos,
            window_size=window_size, window_block_indexes=window_block_indexes,
            pretrain_img_size=pretrain_img_size)

    def state_dict(self):
        return convert_weights(self.twin.state_dict(), 'detectron2').weights
"""
VITDETS = [
    (
        'dict(type="ViT", embed_dim=24, depth=3, num_heads=2, window_size=5, use_rel_pos=True, '
        'window_block_indexes=[0, 2], img_size=320, use_abs_pos=True)',
        dict(embed_dims=24, num_layers=3, single_output=True, pretrain_img_size=224),
    ),
    (
        'dict(type="mmpretrain.ViTSAM", arch="base", img_size=224, out_channels=0)',
        dict(arch='base', out_channels=0),
    ),
    ('dict(type="mmpretrain.ViTSAM", use_abs_pos=True)', dict(img_size=224, out_channels=256)),
]


@pytest.mark.parametrize(('source', 'changed'), VITDETS, ids=['mmdet', 'mmpretrain', 'sam'])
def test_vitdet_of_mmdets_project_and_of_mmpretrain(source, changed, write, tmp_path, monkeypatch):
    if 'mmpretrain' in source:
        pytest.importorskip('mmpretrain.models')
    monkeypatch.syspath_prepend(tmp_path)
    write(VITDET_PROJECT, 'vitdet_project.py')
    text = 'default_scope = "mmdet"\ncustom_imports = dict(imports="vitdet_project")\n'
    swapped = idle_config(write(f'{text}model = dict(backbone={source})'), KEEP)
    cfg = Config.fromfile(swapped.file).model.backbone
    assert cfg.type == 'IdleViTDet'
    assert {key: cfg[key] for key in changed} == changed
    assert not {'embed_dim', 'depth', 'use_abs_pos'} & cfg.keys()


def test_a_class_that_no_library_has_is_named(write):
    text = 'default_scope = "mmdet"\nmodel = dict(backbone=dict(type="mmdet.ViT", depth=3))'
    registry = importlib.import_module('mmdet.registry').MODELS
    known = registry.module_dict.pop('ViT', None)
    try:
        with pytest.raises(UsageError, match='is a ViT, which mmdet has not; allowed: custom_impo'):
            idle_config(write(text), KEEP)
    finally:
        if known:
            registry.module_dict['ViT'] = known


def test_refused_with_the_reason(tmp_path):
    for name, reason in REFUSED:
        with pytest.raises(UsageError, match=reason):
            idle_config(name, KEEP, str(tmp_path / 'idle.py'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('given', [{}, dict(pad_small_map=True, out_indices=(0, 1))])
def test_a_backbone_of_mmpretrain(write, given):
    """As configs of mmdet name it; what the classes have by default differs."""
    pytest.importorskip('mmpretrain')
    numbers = dict(embed_dims=8, depths=[1, 1, 1, 2], num_heads=[1, 1, 2, 2])
    arch = dict(numbers, extra_norm_every_n_blocks=0)
    part = dict(type='mmpretrain.SwinTransformerV2', arch=arch, window_size=4, norm_eval=False)
    imports = dict(imports=['mmpretrain.models'], allow_failed_imports=False)
    config = write(
        f'default_scope = "mmdet"\ncustom_imports = {imports!r}\n'
        f'model = dict(backbone={dict(part, **given)!r})'
    )
    swapped = idle_config(config, Settings(keep=1.0))
    defaults = dict(pad_small_map=('(none)', False), out_indices=('(none)', [3]))
    assert {key.rpartition('.')[2]: pair for key, pair in swapped.changed.items()} == {
        'type': ('mmpretrain.SwinTransformerV2', 'IdleSwinTransformerV2'),
        'keep_ratios': ('(none)', 1.0),
        'norm_eval': (False, '(none)'),
        '1': ('(none)', 'idlevit_mm'),
        **({} if given else defaults),
    }
    with MODELS.switch_scope_and_registry('mmdet'):
        dense, idle = (
            MODELS.build(Config.fromfile(path).model.backbone) for path in (config, swapped.file)
        )
    idle.load_state_dict(dense.state_dict(), strict=True)
    dense.eval(), idle.eval()
    images = torch.randn(1, 3, 150, 190)
    with torch.no_grad():
        for ours, theirs in zip(idle(images), dense(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nested_model_keeps_its_teacher_dense(write):
    part = f'dict(type="FCOS", backbone={swin()})'
    config = write(
        f'default_scope = "mmdet"\nmodel = dict(type="X", detector={part}, teacher={part})'
    )
    swapped = idle_config(config, KEEP)
    model = Config.fromfile(swapped.file).model
    assert model.detector.backbone.type == 'IdleSwinTransformer'
    assert model.detector.type == 'FCOS'
    assert model.detector.backbone.embed_dims == 16
    assert model.teacher == Config.fromfile(config).model.teacher
    assert swapped.left == ('model.teacher.backbone',)
    assert swapped.file == Path(config).with_name('mine_idle.py')


def test_settings_of_the_user_are_extended_not_replaced(write):
    parent = write('model = dict(backbone=dict(type="ResNet", depth=50))', 'base/parent.py')
    config = write(
        f'_base_ = "{parent}"\n'
        'default_scope = "mmseg"\n'
        'custom_imports = dict(imports=["json", "csv"], allow_failed_imports=True)\n'
        'custom_hooks = [dict(type="EMAHook"), dict(type="NumClassCheckHook")]\n'
        'resume = True\n'
        f'model = dict(backbone={swin("mmdet.SwinTransformer", _delete_=True)})'
    )
    settings = Settings(
        keep=[1.0, 0.7, 0.7, 0.5],
        policy=dict(scorer='mean_query', scope='window_tokens'),
        idle_where='pays',
        load_from='runs/epoch_12.pth',
        distill=True,
        random_ratios=(0.3, 1.0),
    )
    swapped = idle_config(config, settings, str(Path(config).parent / 'base' / 'odd-name.py'))
    assert differences(resolved(config), resolved(swapped.file)) == {
        'model.backbone.type': ('mmdet.SwinTransformer', 'IdleSwinTransformer'),
        'model.backbone.keep_ratios': ('(none)', [1.0, 0.7, 0.7, 0.5]),
        'model.backbone.policy': ('(none)', dict(scorer='mean_query', scope='window_tokens')),
        'model.backbone.idle_where': ('(none)', 'pays'),
        'custom_imports.imports.2': ('(none)', 'idlevit_mm'),
        'custom_hooks.2': (
            '(none)',
            dict(type='RandomKeepRatioHook', low=0.3, high=1.0, sandwich=True),
        ),
        'custom_hooks.3': (
            '(none)',
            dict(
                type='AuxiliaryLossHook',
                losses=[dict(type='FeatureDistillation')],
            ),
        ),
        'load_from': ('(none)', 'runs/epoch_12.pth'),
        'resume': (True, False),
    }
    text = swapped.file.read_text()
    assert "_base_ = '../mine.py'" in text
    assert text.startswith('# mine.py with idle tokens, written by tools/idle_config.py\n')


def test_a_checkpoint_to_start_from_replaces_the_weights_of_the_backbone(write):
    backbone = swin(init_cfg=dict(type='TruncNormal', layer='Linear'), pretrained=None)
    config = write(f'default_scope = "mmdet"\nmodel = dict(backbone={backbone})')
    with pytest.raises(UsageError, match='cannot begin with init_cfg=.*--load-from'):
        idle_config(config, KEEP)
    swapped = idle_config(config, Settings(keep=0.7, load_from='dense.pth'))
    cfg = Config.fromfile(swapped.file)
    assert cfg.model.backbone.init_cfg is None
    assert cfg.load_from == 'dense.pth'


def test_a_checkpoint_to_start_from_replaces_the_weights_of_the_segmentor(tmp_path):
    out = str(tmp_path / 'idle.py')
    for name, place in [
        ('setr/setr_vit-l_naive_8xb2-160k_ade20k-512x512.py', 'model.backbone.init_cfg'),
        ('vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py', 'model.pretrained'),
    ]:
        assert place not in idle_config(f'mmseg::{name}', KEEP, out, force=True).changed
        settings = Settings(keep=0.7, load_from='dense.pth')
        changed = idle_config(f'mmseg::{name}', settings, out, force=True).changed
        assert changed[place][0] is not None
        assert changed[place][1] is None
        assert changed['load_from'] == (None, 'dense.pth')


@pytest.mark.parametrize('suffix', ['.yaml', '.json'])
def test_config_that_is_not_python(write, suffix):
    model = dict(backbone=dict(type='PyramidVisionTransformerV2', num_layers=[1, 1, 1, 1]))
    hooks = [dict(type='EMAHook')]
    cfg = Config(dict(default_scope='mmdet', model=model, custom_hooks=hooks))
    path = write('')
    cfg.dump(path.replace('.py', suffix))
    swapped = idle_config(path.replace('.py', suffix), Settings(keep=0.5, random_ratios=(0.4, 0.6)))
    after = Config.fromfile(swapped.file)
    assert after.model.backbone.type == 'IdlePyramidVisionTransformerV2'
    assert [hook.type for hook in after.custom_hooks] == ['EMAHook', 'RandomKeepRatioHook']


NEW_STYLE = """
from mmdet.models import DetDataPreprocessor, FPN, RetinaHead, RetinaNet, SwinTransformer
from mmdet.models.losses import FocalLoss
from mmdet.models.task_modules import MaxIoUAssigner, PseudoSampler
from mmengine.hooks import CheckpointHook, EMAHook

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(type=SwinTransformer, embed_dims=16, depths=[1, 1, 2, 1],
                  num_heads=[1, 2, 4, 8], window_size=4),
    neck=dict(type=FPN, in_channels=[16, 32, 64, 128], out_channels=8, num_outs=5),
    bbox_head=dict(type=RetinaHead, num_classes=80, in_channels=8, feat_channels=8,
                   loss_cls=dict(type=FocalLoss)),
    train_cfg=dict(assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4),
                   sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1),
)
default_hooks = dict(checkpoint=dict(type=CheckpointHook))
custom_hooks = [dict(type=EMAHook)]
work_dir = 'runs'
"""


@pytest.mark.parametrize('name', ['mine.py', 'mask-rcnn.py'])
def test_config_in_pure_python_style_is_written_resolved(write, tmp_path, name):
    config = write(NEW_STYLE, f'home/{name}')
    settings = Settings(keep=0.7, load_from='dense.pth', distill=True, random_ratios=(0.5, 0.9))
    swapped = idle_config(config, settings, str(tmp_path / 'idle.py'))
    before, after = Config.fromfile(config), Config.fromfile(swapped.file)
    assert set(swapped.changed) == set(differences(before.to_dict(), after.to_dict()))
    assert set(swapped.changed) == {
        'model.backbone.type',
        'model.backbone.keep_ratios',
        'custom_imports',
        'load_from',
        'custom_hooks.1',
        'custom_hooks.2',
    }
    assert '_base_' not in after
    assert MODELS.build(after.model.backbone).keep_ratios == [[0.7], [0.7], [0.7, 0.7], [0.7]]
    hooks = [type(HOOKS.build(hook)).__name__ for hook in after.custom_hooks]
    assert hooks == ['EMAHook', 'RandomKeepRatioHook', 'AuxiliaryLossHook']


@pytest.mark.usefixtures('layout')
def test_config_that_is_no_text(write):
    config = write(f'{NEW_STYLE}\nanything = object()')
    with pytest.raises(UsageError, match=r'mine\.py cannot be written as text'):
        idle_config(config, KEEP)


MINE = f'default_scope = "mmdet"\nmodel = dict(backbone={swin()})'
WRONG = [
    (MINE, dict(settings=Settings(keep=0.0)), r'keep_ratios=0\.0 .*which is not in \(0, 1\]'),
    (MINE, dict(settings=Settings(keep=1.2)), r'keep_ratios=1\.2 .*which is not in \(0, 1\]'),
    (MINE, dict(settings=Settings(keep=float('nan'))), 'keep_ratios=nan .*not in'),
    (MINE, dict(settings=Settings(keep=[0.7, 0.5])), 'has 2 entries for 4 stages'),
    (MINE, dict(settings=Settings(keep=0.7, policy=dict(scorer='best'))), "'best'"),
    (MINE, dict(settings=Settings(keep=0.7, policy=dict(type='Nothing'))), "'Nothing'"),
    (MINE, dict(settings=Settings(keep=0.7, policy=dict(scope='pixels'))), "'pixels'"),
    (MINE, dict(settings=Settings(keep=0.7, random_ratios=(0.9, 0.5))), 'low=0.9 must not be'),
    (MINE, dict(settings=Settings(keep=0.7, random_ratios=(0.0, 0.5))), r'low is 0\.0'),
    (MINE, dict(settings=Settings(keep=1.0, random_ratios=(0.4, 0.5))), '--random-ratios leaves'),
    (MINE, dict(settings=Settings(keep=0.7, distill=True)), '--distill needs .*--load-from'),
    (MINE, dict(out='mine_idle.txt'), 'must end in .py'),
    (MINE, dict(out='{folder}/mine.py'), 'is the config itself'),
    (MINE, dict(out='{folder}/mine.yaml.py'), 'exists already; --force replaces'),
    (MINE, dict(out='{folder}/none/x.py'), 'the folder .*none does not exist'),
    (MINE, dict(config='absent.py'), r'config .*absent\.py does not exist'),
    (MINE, dict(config='nomm::a.py'), 'nomm is not installed'),
    (MINE, dict(config='mmdet::a.py'), r'config .*a\.py does not exist'),
    ('model = dict(', {}, 'cannot be read'),
    ('x = 1', {}, 'the config has no model'),
    ('model = dict(type="A")', {}, 'found: no backbone at all; convertible: mmdet.SwinTr'),
    (f'model = dict(backbone={swin("mmpretrain.SwinTransformer")})', {}, 'is mmpretrain.Swin'),
    (
        f'model = dict(backbone={swin("IdleSwinTransformer")})',
        {},
        r'model\.backbone is idle already; set',
    ),
    (
        f'default_scope = "mmdet"\nmodel = dict(backbones=[dict(backbone={swin()})])',
        {},
        r'model\.backbones\.0\.backbone \(mmdet\.SwinTransformer\) stands in a list',
    ),
    (
        f'default_scope = "mmdet"\nmodel = dict(backbone={swin(my_option=3)})',
        {},
        r'IdleSwinTransformer has no my_option=3',
    ),
    (
        f'{MINE}\ncustom_hooks = [dict(type="AuxiliaryLossHook", losses=[])]',
        dict(settings=Settings(keep=0.7, load_from='a.pth', distill=True)),
        'has a AuxiliaryLossHook already',
    ),
]


def test_what_is_wrong_is_one_line(write, tmp_path, capsys):
    write('', 'mine.yaml.py')
    there = {*tmp_path.iterdir(), tmp_path / 'mine.py'}
    for text, arguments, message in WRONG:
        calls = {'config': write(text), 'settings': KEEP, **arguments}
        if 'out' in calls:
            calls['out'] = calls['out'].format(folder=tmp_path)
        with pytest.raises(SystemExit) as exit_:
            run_tool(write_idle_config, **calls)
        assert exit_.value.code == 2
        assert re.fullmatch(f'error: .*{message}.*\n', capsys.readouterr().err)
        assert set(tmp_path.iterdir()) == there


def test_force_replaces_and_the_report_names_what_changed(write, capsys):
    config = write(MINE)
    for keep in (0.7, 0.5):
        write_idle_config(config, Settings(keep=keep), force=True)
    assert Config.fromfile(config.replace('.py', '_idle.py')).model.backbone.keep_ratios == 0.5
    printed = capsys.readouterr().out
    assert 'model.backbone.type: SwinTransformer -> IdleSwinTransformer' in printed
    assert 'model.backbone.keep_ratios: (none) -> 0.5' in printed


def test_keep_ratios_of_the_command_line():
    for words, expected in [
        (['0.7'], 0.7),
        (['1.0', '0.7', '0.7', '0.5'], [1.0, 0.7, 0.7, 0.5]),
        (['[[1, 1], [0.5, 0.5]]'], [[1, 1], [0.5, 0.5]]),
        (["{'type': 'powers', 'keep_ratio': 0.7}"], {'type': 'powers', 'keep_ratio': 0.7}),
    ]:
        assert parse_keep(words) == expected
    with pytest.raises(UsageError, match='--keep much: allowed are'):
        parse_keep(['much'])


def test_the_tool_ends_in_one_line(write, monkeypatch, capsys):
    tool = Path(__file__).parents[2] / 'tools' / 'idle_config.py'
    monkeypatch.setattr(sys, 'argv', ['idle_config.py', write(MINE), '--keep', '0.7', '1.2'])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(tool), run_name='__main__')
    said = capsys.readouterr().err
    assert said.startswith('error: ')
    assert 'keep_ratios=[0.7, 1.2] has 2 entries for 4 stages' in said
    assert said.count('\n') == 1
