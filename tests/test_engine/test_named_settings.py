"""Wrong settings are one line with the key, its value and what is meant, before data are opened."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import MODELS
from test_launch import config, told  # noqa: F401 (a fixture)
from toy import ToyData, ToyMetric, toy_runner

from idlevit_mm.analysis.models import load_model
from idlevit_mm.engine import ResumableRunner, SettingError, UsageError, first
from idlevit_mm.engine.first import _batch, _check_score, rehearse
from idlevit_mm.engine.launch import load_config, train_from_config
from idlevit_mm.engine.settings import check_settings

WRONG = [
    ({'modle.backbone.keep_ratios': 0.5}, 'modle is no setting .*did you mean model'),
    ({'train_dataloder.batch_size': 2}, 'train_dataloder is no .*did you mean train_dataloader'),
    ({'val_evalutor.type': 'x'}, 'val_evalutor is no .*did you mean val_evaluator'),
    ({'optim_wraper.type': 'x'}, 'did you mean optim_wrapper'),
    ({'custom_hook': []}, 'did you mean custom_hooks'),
    ({'resume': 'maybe'}, "resume='maybe' must be True or False"),
    ({'load_from': 3}, 'load_from=3 must be a path'),
    ({'optim_wrapper': 'x'}, "^optim_wrapper='x' must be a dict"),
    ({'train_dataloader': [3]}, r'^train_dataloader=\[3\] must be a dict'),
    ({'test_dataloader.dataset': 3}, r'^test_dataloader\.dataset=3 must be a dict'),
    ({'train_cfg.max_epochs': 0}, r'train_cfg\.max_epochs=0 must be a whole number from 1'),
    ({'train_cfg.max_epochs': -1}, r'train_cfg\.max_epochs=-1'),
    ({'train_cfg.max_epochs': 'x'}, r"train_cfg\.max_epochs='x'"),
    ({'train_cfg.val_interval': 0}, r'train_cfg\.val_interval=0'),
    ({'train_cfg.max_epoch': 1}, r'train_cfg\.max_epoch is no argument .*mean max_epochs'),
    ({'train_cfg.type': 'EpochBasedTrainLop'}, 'unknown; did you mean EpochBasedTrainLoop'),
    ({'model_wrapper_cfg.tpye': 'x'}, r'model_wrapper_cfg\.tpye .*did you mean type'),
    ({'model_wrapper_cfg.type': 'FullyShardedModle'}, 'did you mean FullyShardedModel'),
    (
        {'model_wrapper_cfg': dict(type='FullyShardedModel', unit=['x'])},
        r'model_wrapper_cfg\.unit is no argument .*did you mean units',
    ),
    (
        {'model_wrapper_cfg': dict(type='MMDistributedDataParallel', find_unused_parametres=True)},
        'did you mean find_unused_parameters',
    ),
    ({'model.backbone.keep_ratio': 0.5}, "argument 'keep_ratio'; did you mean keep_ratios"),
    ({'model.bakbone': {}}, 'did you mean backbone'),
    ({'model.backbone.depths': [0, 1, 1, 1]}, r'^model\.backbone does .*depths=\[0, 1, 1, 1\]'),
    ({'model.backbone.norm_cfg.type': 'LNN'}, r"^model\.backbone\.norm_cfg={'type': 'LNN'}"),
    ({'model.backbone.type': 'IdleSwinTransformr'}, r'registry; did you mean IdleSwinTransformer'),
    ({'model.neck.out_channels': -8}, r'^model\.neck does not build: .*-8'),
    ({'model.neck.num_outs': 3}, r'^model\.neck does not build: .*assert num_outs >= '),
    ({'model.bbox_head.num_classes': 'x'}, r"^model\.bbox_head={.*'num_classes': 'x'"),
    (
        {'model.neck.in_channels': [16, 32, 64, 99]},
        r'^model\.neck\.in_channels=\[16, 32, 64, 99\], but .* maps of \[16, 32, 64, 128\]',
    ),
    ({'model.backbone.out_indices': [1, 2, 3]}, r'maps of \[32, 64, 128\] .*out_indices=\(1, 2, 3'),
    ({'model.bbox_head.in_channels': 9}, r'bbox_head\.in_channels=9, but .* \[8, 8, 8, 8, 8\]'),
    ({'model.neck.num_outs': 6}, r'^model\.bbox_head has anchors for 5 levels .*gets 6 maps'),
    (
        {
            'model.backbone.in_channels': 4,
            'model.data_preprocessor': dict(type='DetDataPreprocessor', mean=[0] * 3, std=[1] * 3),
        },
        r'backbone\.in_channels=4, but .*mean has 3 entries',
    ),
    (
        {'model.data_preprocessor': dict(type='DetDataPreprocessor', mean=[0], std=[0])},
        r'data_preprocessor\.std holds 0; allowed',
    ),
    (
        {'default_hooks': dict(checkpoint=dict(type='CheckpointHook', interval=0))},
        r'CheckpointHook\.interval=0',
    ),
]


def refused(message, function, *arguments, **options):
    """Call what must end in a line."""
    with pytest.raises(UsageError, match=message) as error:
        function(*arguments, **options)
    assert '\n' not in str(error.value)


def test_wrong_names_and_numbers(config, subtests):  # noqa: F811
    for options, message in WRONG:
        with subtests.test(str(options)):
            refused(message, train_from_config, config, cfg_options=options)


SEGMENTORS = [
    (dict(test_cfg=dict(mode='slid')), r"model\.test_cfg\.mode='slid'; allowed: slide, whole"),
    (dict(test_cfg=dict(mode='slide', crop_size=(0, 9))), r'test_cfg\.crop_size=\(0, 9\)'),
    (dict(test_cfg=dict(mode='slide', crop_size=(9, 9))), r'model\.test_cfg\.stride=None'),
    (
        dict(decode_head=dict(in_channels=[8, 8, 8, 9])),
        r'in_channels=\[8, 8, 8, 9\], but .*\[8, 8, 8, 8\]',
    ),
    (
        dict(decode_head=dict(in_index=[0, 1, 2, 4])),
        r'model\.decode_head\..*in_index=\[0, 1, 2, 4\]',
    ),
    (
        dict(decode_head=dict(feature_strides=[4, 8, 16])),
        r'decode_head does not build: .*len\(feature_strides\)',
    ),
]


def test_segmentors_that_cannot_be(scene_config, subtests):
    for changes, message in SEGMENTORS:
        with subtests.test(str(changes)):
            cfg = scene_config('fpn_idle-pvt_digits')
            if 'decode_head' in changes:
                wide = dict(in_channels=[32, 64, 128, 256], out_channels=8, num_outs=4)
                cfg.model.neck = dict(type='FPN', **wide)
            cfg.merge_from_dict(dict(model=changes))
            refused(message, load_model, cfg)


UNTESTED = [
    ('retinanet_idle-swin_digits', {'test_cfg': None}, r'NoneType.*get.* \(base_dense_head\.py:'),
    ('retinanet_idle-swin_digits', {'test_cfg.score_thr': [1]}, r'cannot be tested: .*list'),
    ('retinanet_idle-swin_digits', {'test_cfg.max_per_img': 'x'}, r"max_per_img='x' must be a num"),
    ('retinanet_idle-swin_digits', {'test_cfg.nms.type': 'mns'}, r"^model\.test_cfg\.nms .*'mns'"),
    (
        'retinanet_idle-swin_digits',
        {'test_cfg.nms.iou_thrs': 1},
        r'^model\.test_cfg\.nms .*iou_thrs',
    ),
    ('mask-rcnn_idle-swin_digits', {'test_cfg.rcnn.score_thr': 'x'}, r"rcnn\.score_thr='x'"),
    ('fpn_idle-pvt_digits', {'test_cfg': None}, r'NoneType.*get.* \(encoder_decoder\.py:'),
]


@pytest.mark.parametrize(('name', 'changes', 'message'), UNTESTED)
def test_what_only_a_test_reads_is_tried(scene_config, name, changes, message):
    cfg = scene_config(name)
    rehearse(load_model(cfg))
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    model = load_model(cfg).train()
    state = torch.get_rng_state()
    refused(message, rehearse, model)
    assert model.training
    assert model.backbone.training
    assert torch.equal(torch.get_rng_state(), state)


def test_turned_boxes_are_not_tried(scene_config):
    cfg = scene_config('retinanet_idle-swin_digits')
    cfg.model.test_cfg.nms.type = 'nms_rotated'
    rehearse(load_model(cfg))


def test_a_model_that_wants_more_than_an_image_is_not_tried(scene_config):
    cfg = scene_config('mask-rcnn_idle-swin_digits')
    cfg.model.type = 'FastRCNN'
    del cfg.model.rpn_head
    model = load_model(cfg)
    with pytest.raises(AttributeError, match='rpn_head'):
        model.test_step(_batch('mmdet', 3))
    rehearse(model)


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        (
            'retinanet_idle-swin_digits',
            {'train_cfg': None},
            r'does not train: TypeError: .*None.* \(anchor_head\.py:',
        ),
        (
            'fpn_idle-pvt_digits',
            {'decode_head.ignore_index': 'x'},
            r'does not train: TypeError: .*str',
        ),
    ],
)
def test_what_a_loss_cannot_work_with(scene_config, tmp_path, name, changes, message):
    cfg = scene_config(name)
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    cfg.work_dir = str(tmp_path)
    refused(message, ResumableRunner.from_cfg(cfg).train)


def test_a_neck_that_takes_some_of_the_maps_is_right(config):  # noqa: F811
    @MODELS.register_module(force=True)
    class OfTwo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channels = [64, 128]

        def forward(self, maps):
            return [one[:, :8] for one in maps[2:]]

    load_model(config, cfg_options={'model.neck': dict(type='OfTwo', _delete_=True)})


def test_maps_of_a_subclass_may_be_of_any_width(config):  # noqa: F811
    class Narrow(MODELS.get('IdleSwinTransformer')):
        def forward(self, x):
            return [out[:, :16] for out in super().forward(x)]

    options = {'model.neck.in_channels': [16] * 4, 'model.backbone.type': Narrow}
    load_model(config, cfg_options=options)


def test_a_config_that_exits(tmp_path):
    path = tmp_path / 'net.py'
    path.write_text('import sys\nsys.exit(0)')
    with pytest.raises(UsageError, match=r'net\.py cannot be read'):
        load_config(str(path))


def test_variables_of_a_config_are_its_own():
    names = ('models', 'data_root', 'train_pipeline', 'val_dataset', 'train_batch_size', 'lr')
    names += ('max_epochs', 'norm_cfg', 'checkpoint', 'crop_size', 'test_pipeline', 'optimizer')
    check_settings(Config(dict.fromkeys(names[1:], 1)))
    check_settings(Config(dict(train_cfg=None, model_wrapper_cfg=dict(device_ids=None))))
    check_settings(Config(dict(train_cfg=dict(by_epoch=False, max_iters=1e4, val_interval=10))))


class NoData(ToyData):
    """Says when it is opened."""

    def __init__(self):
        raise RuntimeError('the data are opened')


LATE = [
    (dict(optim_wrapper=dict(optimizer=dict(type='Adamm', lr=1))), r"type='Adamm' .*mean Adam"),
    (dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=-1))), 'optim_wrapper .*learning rate'),
    (
        dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=1), clip_grad=dict(max_nrm=1))),
        r'optim_wrapper\.clip_grad .*max_nrm',
    ),
    (
        dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=1), clip_grad=dict(max_norm='x'))),
        r'optim_wrapper\.clip_grad does not build',
    ),
    (dict(param_scheduler=dict(type='LinearLRR')), 'param_scheduler does not build'),
    (
        dict(param_scheduler=[dict(type='MultiStepLR', milestone=[1])]),
        'param_scheduler .*milestone',
    ),
    (dict(param_scheduler=dict(type='LinearLR', start_factor=2.0)), 'param_scheduler .*factor'),
    (dict(val_evaluator=dict(type='NoMetric')), 'val_evaluator does not build'),
    (dict(val_evaluator=dict(type='DumpResults', file='x')), 'val_evaluator .*file'),
]


def test_everything_else_is_built_before_the_data(tmp_path, subtests):
    loader = dict(dataset=dict(type=NoData), sampler=dict(type='DefaultSampler'), batch_size=1)
    for number, (changes, message) in enumerate(LATE):
        with subtests.test(message):
            runner = toy_runner(tmp_path / str(number), train_dataloader=loader, **changes)
            refused(message, runner.train)


SCHEDULERS = [
    dict(type='OneCycleLR', eta_max=1.0, total_steps=20, by_epoch=False),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True),
    dict(type='LinearMomentum', start_factor=0.5),
    dict(type='ReduceOnPlateauLR', monitor='toy/acc'),
    dict(type='PolyLR', eta_min=0.001, power=0.9),
]


@pytest.mark.parametrize(
    ('optimizer', 'scheduler'),
    [
        *zip(('SGD', 'Rprop', 'AdamW', 'Rprop', 'SGD'), SCHEDULERS, strict=True),
        ('AdamW', SCHEDULERS[0]),
    ],
    ids=str,
)
def test_what_mmengine_trains_is_trained(tmp_path, scheduler, optimizer):
    arguments = dict(momentum=0.9) if optimizer == 'SGD' else {}
    toy_runner(
        tmp_path,
        param_scheduler=scheduler,
        optim_wrapper=dict(
            optimizer=dict(type=optimizer, lr=0.01, **arguments), clip_grad=dict(max_norm=1)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
    ).train()


class IoUMetric(BaseMetric):
    """Has what those of mmdet and mmseg have."""

    default_prefix = None
    metrics = ['mIoU']
    process = compute_metrics = None


class CocoMetric(IoUMetric):
    default_prefix, metrics, classwise = 'coco', ['bbox', 'segm'], True


class VOCMetric(IoUMetric):
    metric, iou_thrs, default_prefix = 'mAP', [0.5], 'pascal_voc'


class CocoPanopticMetric(IoUMetric):
    default_prefix = 'coco_panoptic'


class DumpResults(IoUMetric):
    pass


def test_scores_that_decide_which_checkpoint_is_best(monkeypatch):
    said = []
    monkeypatch.setattr(first, 'warn', said.append)
    for key, metrics in [
        *((key, [IoUMetric()]) for key in ('mIoU', 'auto')),
        *((key, [CocoMetric(), DumpResults()]) for key in ('coco/bbox_mAP', 'coco/segm_mAP_50')),
        ('coco/person_precision', [CocoMetric()]),
        *((key, [VOCMetric()]) for key in ('pascal_voc/mAP', 'pascal_voc/AP50')),
        ('coco_panoptic/PQ_th', [CocoPanopticMetric()]),
    ]:
        _check_score('save_best', [key], metrics)
    for key, metric, hint in [
        ('mIou', IoUMetric(), 'did you mean mIoU'),
        ('mDice', IoUMetric(), 'allowed: auto, aAcc, mIoU, mAcc'),
        ('bbox_mAP', CocoMetric(), 'did you mean coco/bbox_mAP'),
        ('coco/mask_mAP', CocoMetric(), 'no score of val_evaluator'),
        *(('mAP', VOCMetric(), 'no score'), ('coco/PQ', CocoPanopticMetric(), 'no score')),
    ]:
        with pytest.raises(SettingError, match=f'save_best={key!r} .*{hint}'):
            _check_score('save_best', [key], [metric, DumpResults()])
    assert not said
    # A run whose scores cannot be known is left alone.
    _check_score('save_best', ['toy/accc', 'auto'], [ToyMetric(), CocoMetric()])
    assert len(said) == 1
    assert re.search(r"save_best='toy/accc': only the first validation .* ToyMetric", said[0])


def test_what_would_wait_in_vain_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(first, 'warn', said.append)
    monkeypatch.setattr(first, '_scores', lambda _: ['acc'])
    stop = dict(type='EarlyStoppingHook', monitor='toy/accc')
    runner = toy_runner(
        tmp_path,
        hooks=[stop],
        param_scheduler=dict(type='ReduceOnPlateauLR', monitor='acc'),
        train_cfg=dict(by_epoch=True, max_epochs=1),
    )
    runner.cfg.optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbnoe': {}, 'table': {}}))
    runner.train()
    assert [text.partition(';')[0] for text in said] == [
        "optim_wrapper.paramwise_cfg.custom_keys: 'backbnoe' is in the name of no weight",
        "custom_hooks.EarlyStoppingHook.monitor='toy/accc' is no score of val_evaluator",
        "param_scheduler.monitor='acc' is no score of val_evaluator",
    ]
    stopping = toy_runner(tmp_path, hooks=[dict(stop, strict=True)])
    with pytest.raises(SettingError, match=r"monitor='toy/accc' .*allowed: auto, toy/acc"):
        stopping.train()


def test_a_score_that_only_the_validation_shows_to_be_missing(tmp_path):
    runner = toy_runner(tmp_path, checkpoint=dict(save_best='toy/accc', rule='greater'))
    with pytest.raises(SettingError, match=r"save_best='toy/accc' .*allowed: auto, toy/acc"):
        runner.train()
    assert (tmp_path / 'epoch_2.pth').exists()
