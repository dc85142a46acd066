"""The options of the tools, and the errors they give."""

import argparse
import json
import os
import pickle
import re
import uuid

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from idlevit_mm.engine import ResumableRunner, UsageError, launch, options, processes
from idlevit_mm.engine.launch import (
    build_runner,
    evaluate_from_config,
    load_config,
    run_tool,
    task_of,
    train_from_config,
)

BASE = """
default_scope = 'mmdet'
custom_imports = dict(imports=['idlevit_mm'], allow_failed_imports=False)
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='IdleSwinTransformer',
        embed_dims=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        keep_ratios=0.5,
    ),
    bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8),
    neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=8, num_outs=5),
)
data = dict(
    type='CocoDataset', data_root='{root}', ann_file='a.json', data_prefix=dict(img='img'),
    metainfo=dict(classes=('person', 'bicycle')),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')],
)
train_dataloader = dict(
    batch_size=1, num_workers=0, dataset=data, sampler=dict(type='DefaultSampler', shuffle=True)
)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
test_dataloader = train_dataloader
test_cfg = dict(type='TestLoop')
test_evaluator = dict(type='CocoMetric', ann_file='{root}/a.json', metric='bbox')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
auto_scale_lr = dict(enable=False, base_batch_size=8)
log_level = 'ERROR'
experiment_name = '{name}'
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Path of a config whose data and weights exist; the current folder is its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'img').mkdir(parents=True)
    (tmp_path / 'data' / 'a.json').write_text('{"images": [], "annotations": [], "categories": []}')
    path = tmp_path / 'net.py'
    text = BASE.replace('{root}', str(tmp_path / 'data'))
    # mmengine keeps scopes by the name of the experiment; the default is the time in seconds.
    path.write_text(text.replace('{name}', uuid.uuid4().hex))
    torch.save({'state_dict': {'backbone.w': torch.ones(1)}}, tmp_path / 'weights.pth')
    return str(path)


def test_missing_and_bad_configs(tmp_path):
    with pytest.raises(UsageError, match=r'config nowhere\.py does not exist'):
        load_config('nowhere.py')
    bad = tmp_path / 'bad.py'
    bad.write_text("_base_ = './nowhere.py'")
    with pytest.raises(UsageError, match=r'bad\.py cannot be read: .*nowhere\.py'):
        load_config(str(bad))
    bad.write_text('model = dict(')
    with pytest.raises(UsageError, match=r'bad\.py cannot be read'):
        load_config(str(bad))


def test_options_that_do_not_fit(config):
    assert load_config(config, {'train_cfg.max_epochs': 3}).train_cfg.max_epochs == 3
    with pytest.raises(UsageError, match='--cfg-options does not fit'):
        load_config(config, {'test_evaluator.metric.x': 1})


@pytest.mark.parametrize('option', ['abc', "h=[dict(a='x',b=1)]", 'x=1,2,(3', 'h=[1,2))'])
def test_options_that_cannot_be_read(capsys, option):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=options.Overrides)
    given = parser.parse_args(['--cfg-options', 'a.b=1', 'c=[1,2]', 'd=(x,True)']).cfg_options
    assert given == {'a.b': 1, 'c': [1, 2], 'd': ('x', True)}
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', 'a=1', option])
    assert f'--cfg-options {option}: allowed are KEY=VALUE' in capsys.readouterr().err


def test_a_user_error_is_one_line(config, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_:
        run_tool(train_from_config, config='nowhere.py')
    assert exit_.value.code == 2
    assert capsys.readouterr().err == 'error: config nowhere.py does not exist\n'
    monkeypatch.setenv(launch.TRACEBACK_VARIABLE, '1')
    with pytest.raises(UsageError):
        run_tool(train_from_config, config='nowhere.py')


def test_torchrun_gets_a_user_error_with_its_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / 'error.json'))
    assert told(capsys, train_from_config, 'nowhere.py') == 'config nowhere.py does not exist'
    recorded = json.loads((tmp_path / 'error.json').read_text())['message']
    assert recorded['message'] == 'UsageError: config nowhere.py does not exist'
    assert 'in load_config' in recorded['extraInfo']['py_callstack']


def test_a_bug_keeps_its_traceback():
    def bug():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_tool(bug)


@HOOKS.register_module()
class FaultyHook(Hook):
    """Somebody else's hook, with a fault."""

    def before_train(self, runner):
        raise ValueError('a fault')


@pytest.fixture
def one_image(config, tmp_path):
    """The config, with a data set that has something to train on."""
    image = dict(id=1, file_name='a.jpg', width=8, height=8)
    box = dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 4, 4], area=16, iscrowd=0)
    classes = [dict(id=1, name='person')]
    data = dict(images=[image], annotations=[box], categories=classes)
    (tmp_path / 'data' / 'a.json').write_text(json.dumps(data))
    return config


def told(capsys, tool, config, **arguments):
    """The one line that a tool ends with."""
    with pytest.raises(SystemExit) as exit_:
        run_tool(tool, config=config, **arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')
    return line.removeprefix('error: ')


WARMUP = dict(type='KeepRatioWarmupHook', end=1)
LATE_ERRORS = [
    (dict(custom_hooks=[WARMUP, WARMUP]), '.*only one hook can set the keep ratios.*'),
    (
        {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint='weights.pth')},
        r".*checkpoint 'weights\.pth' has no weight of IdleSwinTransformer.*",
    ),
]


@pytest.mark.parametrize(('options', 'message'), LATE_ERRORS)
def test_what_hooks_and_backbones_find_is_one_line(one_image, capsys, options, message):
    assert re.fullmatch(message, told(capsys, train_from_config, one_image, cfg_options=options))


def test_faults_of_other_origin_keep_their_traceback(one_image):
    with pytest.raises(ValueError, match='a fault') as error:
        run_tool(
            train_from_config,
            config=one_image,
            cfg_options=dict(custom_hooks=[dict(type='FaultyHook')]),
        )
    assert not isinstance(error.value, UsageError)


TRAIN_ERRORS = [
    (dict(resume='nowhere.pth'), r'--resume nowhere\.pth does not exist'),
    (dict(resume='weights.pth'), r'weights only.*load_from=weights\.pth'),
    (dict(cfg_options={'load_from': 'nowhere.pth'}), r'load_from nowhere\.pth does not exist'),
    (
        dict(cfg_options={'load_from': 'work_dirs/net/x.pth'}),
        r'Train it first: python tools/train\.py .*net\.py',
    ),
    (dict(cfg_options={'train_cfg': None}), 'cannot be trained: it has no train_cfg'),
    (
        dict(amp=True, cfg_options={'optim_wrapper.type': 'AmpOptimWrapper'}),
        'in mixed precision already',
    ),
    (
        dict(amp=True, cfg_options={'optim_wrapper.type': 'ApexOptimWrapper'}),
        'optim_wrapper.type is ApexOptimWrapper',
    ),
    (
        dict(auto_scale_lr=True, cfg_options={'auto_scale_lr.base_batch_size': None}),
        'auto_scale_lr.base_batch_size=16',
    ),
    (dict(cfg_options={'train_dataloader.dataset.ann_file': 'b.json'}), r'b\.json does not exist'),
    (dict(work_dir='net.py'), r'work dir net\.py cannot be written to: File exists.*--work-dir'),
    (dict(work_dir='/proc/nowhere'), 'work dir /proc/nowhere cannot be written to: .*--work-dir'),
    (
        dict(cfg_options={'model.backbone.keep_ratios': 1.5}),
        r'does not build: .*keep_ratios=1\.5.*\(0, 1\]',
    ),
    (
        dict(cfg_options={'model.backbone.init_cfg': dict(type='Pretrained', checkpoint='no.pth')}),
        r'model\.backbone\.init_cfg\.checkpoint no\.pth does not exist',
    ),
    (dict(cfg_options={'load_from': 'weights.pth'}), 'shares no backbone weights'),
]


def assert_said(tool, config, table):
    """Each call of a table ends in its message, in one line."""
    for arguments, message in table:
        with pytest.raises(UsageError, match=message) as error:
            tool(config, **arguments)
        assert '\n' not in str(error.value)


def test_train_errors(config):
    assert_said(train_from_config, config, TRAIN_ERRORS)


TEST_ERRORS = [
    (dict(checkpoint='nowhere.pth'), r'checkpoint nowhere\.pth does not exist'),
    (dict(cfg_options={'test_cfg': None}), 'cannot be tested: it has no test_cfg'),
    (dict(out='results'), r'--out results: for detection this is a file that ends in \.pkl'),
    (dict(out='folder.pkl'), r'--out folder\.pkl exists already and is a folder'),
    (dict(show_dir='net.py'), r'--show-dir net\.py is a file'),
    (dict(tta=True, cfg_options={'test_evaluator.metric': ['bbox', 'segm']}), 'boxes only'),
    (
        dict(cfg_options={'default_scope': None, 'model': dict(type='X', _delete_=True)}),
        'default_scope is None',
    ),
    (dict(), 'shares no backbone weights'),
]


def test_test_errors(config):
    os.mkdir('folder.pkl')
    table = [({'checkpoint': 'weights.pth', **given}, message) for given, message in TEST_ERRORS]
    assert_said(evaluate_from_config, config, table)


@pytest.mark.skipif(torch.cuda.is_available(), reason='says what is missing without CUDA')
def test_errors_without_accelerator(config):
    with pytest.raises(UsageError, match='--amp needs an accelerator'):
        train_from_config(config, amp=True)
    with pytest.raises(UsageError, match='on the CPU: --cfg-options optim_wrapper.type=OptimWrap'):
        train_from_config(config, cfg_options={'optim_wrapper.type': 'AmpOptimWrapper'})


def test_a_launcher_that_did_not_start_the_process(config, monkeypatch):
    started_by = {
        'pytorch': ('RANK', 'dist_train.sh'),
        'slurm': ('SLURM_PROCID', 'slurm_train.sh'),
        'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
    }
    for launcher, (absent, starter) in started_by.items():
        monkeypatch.delenv(absent, raising=False)
        with pytest.raises(UsageError, match=f'--launcher {launcher} without {absent} .*{starter}'):
            train_from_config(config, launcher=launcher)


def test_the_first_machine_of_slurms_list():
    first = {
        'localhost': 'localhost',
        'a,b': 'a',
        'node[03-05,9],login': 'node03',
        'gpu-[7,9]-ib': 'gpu-7-ib',
        'node[12]': 'node12',
    }
    assert {nodes: processes.first_host(nodes) for nodes in first} == first


def test_more_processes_than_gpus(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '2')
    monkeypatch.setenv('WORLD_SIZE', '3')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UsageError, match='this machine has 2 GPUs, one for each process: start 2'):
        processes.place_process('pytorch')


def test_slurm_places_a_process(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # put back afterwards
        monkeypatch.delenv(name)
    told = dict(PROCID=5, NTASKS=16, LOCALID=1, NODELIST='n[04-07]', JOB_ID=123456)
    for name, value in told.items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))
    processes.place_process('slurm')
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    assert [os.environ[name] for name in names] == ['5', '16', '1', 'n04', '23456']


def test_amp_and_lr_scaling_are_switched_on(config, monkeypatch):
    monkeypatch.setattr(options, 'get_device', lambda: 'cuda')
    cfg = load_config(config)
    options.set_precision(cfg, amp=True)
    options.scale_lr(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert cfg.auto_scale_lr.enable


def test_unsafe_weights_from_an_address_are_named_with_the_remedy():
    def load():
        raise pickle.UnpicklingError('Unsupported global: GLOBAL evil.run')

    with pytest.raises(UsageError, match=r'GLOBAL evil\.run.*strip_checkpoint'):
        launch.naming_the_remedy(load)


def test_nothing_to_resume_starts_from_load_from(config, capsys):
    cfg = load_config(config, {'load_from': 'weights.pth', 'work_dir': 'new'})
    assert launch._choose_start(cfg, config, 'auto') is not None
    assert (cfg.resume, cfg.load_from) == (False, 'weights.pth')
    assert 'Nothing to resume in new' in capsys.readouterr().out


def test_only_broken_checkpoints_is_an_error(config, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'epoch_1.pth').write_bytes(b'PK')
    with pytest.raises(UsageError, match=r'no checkpoint in run can be resumed from.*epoch_1\.pth'):
        train_from_config(config, work_dir='run', resume='auto')


def test_the_seed_of_the_run_is_kept(config, tmp_path, capsys):
    meta = dict(iter=1, epoch=1, seed=77)
    state = dict(state_dict={}, optimizer={}, message_hub={}, meta=meta)
    (tmp_path / 'run').mkdir()
    torch.save(state, tmp_path / 'run' / 'epoch_1.pth')
    for asked in (None, 3):
        cfg = load_config(config, {'work_dir': 'run', 'randomness': dict(seed=asked)})
        launch._choose_start(cfg, config, 'auto')
        assert cfg.resume
        assert cfg.randomness.seed == 77
    assert 'randomness.seed=3 is not used' in capsys.readouterr().out


def test_resume_in_the_config_counts(config, tmp_path):
    with pytest.raises(UsageError, match=r'--resume nowhere\.pth'):
        train_from_config(config, cfg_options={'resume': True, 'load_from': 'nowhere.pth'})


def test_task():
    for settings, task in [
        (dict(default_scope='mmdet'), 'detection'),
        (dict(default_scope='mmseg'), 'segmentation'),
        (dict(default_scope='mine', model=dict(decode_head={})), 'segmentation'),
        (dict(model=dict(roi_head={})), 'detection'),
    ]:
        assert task_of(Config(settings)) == task


def segmentor(**more):
    return Config(
        dict(
            default_scope='mmseg',
            test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
            test_dataloader=dict(
                dataset=dict(
                    pipeline=[
                        dict(type='LoadImageFromFile'),
                        dict(type='LoadAnnotations'),
                        dict(type='PackSegInputs'),
                    ]
                )
            ),
            model=dict(type='EncoderDecoder'),
            **more,
        )
    )


def test_out_for_segmentation(tmp_path):
    cfg = segmentor()
    options.write_predictions(cfg, 'segmentation', str(tmp_path / 'labels'))
    assert cfg.test_evaluator.output_dir == str(tmp_path / 'labels')
    cfg = segmentor()
    options.write_predictions(cfg, 'segmentation', str(tmp_path / 'a' / 'labels.pkl'))
    assert [e.type for e in cfg.test_evaluator] == ['IoUMetric', 'mmengine.DumpResults']
    assert (tmp_path / 'a').is_dir()
    with pytest.raises(UsageError, match=r'labels\.png: for segmentation this is a folder'):
        options.write_predictions(cfg, 'segmentation', 'labels.png')
    cfg.test_evaluator = dict(type='OtherMetric')
    with pytest.raises(UsageError, match='no metric of test_evaluator writes label maps'):
        options.write_predictions(cfg, 'segmentation', 'labels')


def test_tta_for_segmentation_flips_before_annotations_are_loaded():
    cfg = segmentor()
    options.augment(cfg, 'segmentation')
    assert cfg.model.type == 'SegTTAModel'
    assert cfg.model.module.type == 'EncoderDecoder'
    load, augment = cfg.test_dataloader.dataset.pipeline
    stages = [[step.type for step in stage] for stage in augment.transforms]
    assert load.type == 'LoadImageFromFile'
    assert stages == [['RandomFlip', 'RandomFlip'], ['LoadAnnotations'], ['PackSegInputs']]
    assert [step.prob for step in augment.transforms[0]] == [0.0, 1.0]


def test_tta_of_the_config_is_taken():
    pipeline = [dict(type='Mine')]
    cfg = segmentor(tta_model=dict(type='MyTTA'), tta_pipeline=pipeline)
    options.augment(cfg, 'segmentation')
    assert cfg.model.type == 'MyTTA'
    assert cfg.test_dataloader.dataset.pipeline == pipeline


def test_a_config_may_name_its_runner(config):
    cfg = load_config(config, {'work_dir': 'run'})
    kinds = {None: launch.ResumableRunner, 'Runner': Runner, 'ResumableRunner': ResumableRunner}
    for name, kind in kinds.items():
        cfg.runner_type = name
        cfg.experiment_name = uuid.uuid4().hex
        assert type(build_runner(cfg)) is kind
