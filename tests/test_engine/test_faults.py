"""Silent nonsense in settings, images that do not fit, faults of the machine: each is one line."""

import os
import re
import signal
import struct

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from PIL import Image
from test_launch import config  # noqa: F401 (a fixture)
from test_named_settings import NoData, refused
from toy import ToyData, ToyModel, toy_runner

from idlevit_mm.engine import BadSampleError, SettingError, UsageError, bad_samples
from idlevit_mm.engine.bad_samples import GuardedPipeline, guard
from idlevit_mm.engine.faults import naming_the_remedy
from idlevit_mm.engine.launch import run_tool
from idlevit_mm.engine.settings import check_settings

NAN = float('nan')
# Settings, and what their line says.
NONSENSE = [
    (dict(train_cfg=dict(max_epochs=1.5)), r'train_cfg\.max_epochs=1\.5 must be a whole number'),
    (dict(train_cfg=dict(val_begin='x')), r"train_cfg\.val_begin='x'"),
    (dict(train_dataloader=dict(batch_size=0)), r'train_dataloader\.batch_size=0 .* from 1 on'),
    (dict(train_dataloader=dict(batch_size='x')), r"train_dataloader\.batch_size='x'"),
    (dict(val_dataloader=dict(num_workers=-1)), r'val_dataloader\.num_workers=-1 .* from 0 on'),
    (dict(test_dataloader=dict(num_workers=1.5)), r'test_dataloader\.num_workers=1\.5'),
    (dict(optim_wrapper=dict(accumulative_counts=1.5)), r'accumulative_counts=1\.5'),
    (dict(auto_scale_lr=dict(enable=True)), r'auto_scale_lr\.base_batch_size=None'),
    (dict(auto_scale_lr=dict(enable=True, base_batch_size=-8)), 'base_batch_size=-8'),
    (dict(env_cfg=dict(dist_cfg=dict(timeout='x'))), r"env_cfg\.dist_cfg\.timeout='x'"),
    (dict(env_cfg=dict(max_pixels=0)), r'env_cfg\.max_pixels=0'),
    (dict(env_cfg=dict(cudnn_benchmrk=True)), 'cudnn_benchmrk is .*did you mean cudnn_benchmark'),
    (dict(env_cfg='x'), "env_cfg='x' must be a dict"),
    (dict(default_hooks=dict(loger=dict())), r'default_hooks\.loger is .*did you mean logger'),
    (dict(default_hooks='x'), 'must be a dict'),
    (dict(compile='x'), "compile='x' must be True, False or a dict"),
    (dict(val_cfg=dict(type='ValLop')), 'unknown; did you mean ValLoop'),
    (dict(val_cfg=dict(fp16='x')), r"val_cfg\.fp16='x' must be True or False"),
    (
        dict(
            train_cfg=dict(by_epoch=True, max_epochs=1),
            train_dataloader=dict(sampler=dict(type='InfiniteSampler')),
        ),
        'InfiniteSampler never ends the epochs',
    ),
    (dict(val_cfg=dict()), 'val_dataloader, val_evaluator is missing or None'),
    (
        dict(optim_wrapper=dict(paramwise_cfg=dict(norm_decay_mlt=0))),
        'norm_decay_mlt is .*did you mean norm_decay_mult',
    ),
    (
        dict(optim_wrapper=dict(paramwise_cfg=dict(custom_keys=dict(norm=dict(lr_mul=1))))),
        r'custom_keys\.norm\.lr_mul is .*did you mean lr_mult',
    ),
]


def test_nonsense_in_a_config(subtests):
    for settings, message in NONSENSE:
        with subtests.test(message):
            if 'val_cfg' in settings and settings['val_cfg']:
                settings = dict(settings, val_dataloader=dict(), val_evaluator=dict())
            refused(message, check_settings, Config(settings))


def test_names_of_ones_own_are_none_misspelt():
    hook = dict(type='CheckpointHook', interval=5)
    check_settings(dict(mode='x', default_hooks=dict(checkpoint2=hook, visualization_val=hook)))


def test_epochs_and_iterations_have_their_samplers():
    for loop in (dict(by_epoch=False, max_iters=3), dict(type='IterBasedTrainLoop', max_iters=3)):
        loader = dict(sampler=dict(type='InfiniteSampler'))
        check_settings(Config(dict(train_cfg=loop, train_dataloader=loader)))
    loader = dict(sampler=dict(type='DefaultSampler'))
    check_settings(Config(dict(train_cfg=dict(max_epochs=1), train_dataloader=loader)))


def optim(**changes):
    return dict(optim_wrapper=dict(optimizer=dict(dict(type='SGD', lr=0.1), **changes)))


def clipped(**limits):
    return dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1), clip_grad=limits))


def scheduled(**scheduler):
    return dict(param_scheduler=[dict(scheduler)])


BEFORE_THE_DATA = [
    (optim(lr=NAN), r'optim_wrapper\.optimizer\.lr=nan must be a finite number'),
    (optim(lr=float('inf')), r'optimizer\.lr=inf'),
    (optim(momentum=2), r'optimizer\.momentum=2 must be at most 1'),
    (optim(weight_decay=NAN), r'optimizer\.weight_decay=nan'),
    (optim(type='SDG'), r"optimizer\.type='SDG' is unknown; did you mean SGD"),
    (clipped(max_norm=-1), r'clip_grad\.max_norm=-1 must be a number above 0'),
    (clipped(max_norm=NAN), r'clip_grad\.max_norm=nan'),
    (scheduled(type='MultiStepLR', milestones=['x']), r"param_scheduler\.0\.milestones='x'"),
    (scheduled(type='MultiStepLR', milestones=[1], gamma=-0.1), r'0\.gamma=-0\.1 .* from 0 on'),
    (scheduled(type='ExponentialLR', gamma=NAN), r'gamma=nan'),
    (scheduled(type='CosineAnnealingLR', T_max=0), r'T_max=0 must be a number from 1 on'),
    (scheduled(type='CosineAnnealingLR', T_max=3, eta_min='x'), r"eta_min='x' must be a number"),
    (scheduled(type='StepLR', step_size=0), r'step_size=0'),
    (scheduled(type='LinearLR', begin=5, end=1), 'param_scheduler .*begin=5, end=1'),
    (dict(cfg=dict(activation_checkpointing=['backbon'])), 'activation_checkpointing .*backbon'),
    (dict(cfg=dict(compile=dict(backend='x'))), "compile .*backend: 'x'"),
    (
        dict(val_evaluator=dict(type='mmseg.IoUMetric', iou_metrics=['mIuO'])),
        "val_evaluator .*'mIuO'; allowed: mIoU, mDice, mFscore",
    ),
]


def test_nonsense_is_refused_before_the_data(tmp_path, subtests):
    loader = dict(dataset=dict(type=NoData), sampler=dict(type='DefaultSampler'), batch_size=1)
    for number, (changes, message) in enumerate(BEFORE_THE_DATA):
        with subtests.test(message):
            runner = toy_runner(tmp_path / str(number), train_dataloader=loader, **changes)
            refused(message, runner.train)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(hooks=[dict(type='EMAHook', momentum=3)]), 'EMAHook does not build: momentum must'),
        (dict(hooks=[dict(type='EMAHook', ema_type='X')]), 'EMAHook does not build: X is not in'),
        (dict(checkpoint=dict(interval='x')), r"CheckpointHook\.interval='x'; allowed: whole"),
        (dict(checkpoint=dict(intervl=1)), r'CheckpointHook\.intervl .*did you mean interval'),
        (
            dict(
                train_dataloader=dict(
                    dataset=ToyData(3),
                    sampler=dict(type='DefaultSampler'),
                    batch_size=4,
                    drop_last=True,
                )
            ),
            r'batch_size=4 with drop_last=True, but 3 images',
        ),
    ],
)
def test_nonsense_is_refused_before_an_epoch(tmp_path, changes, message):
    with pytest.raises((SettingError, ValueError, TypeError), match=message):
        toy_runner(tmp_path, **changes).train()


def test_limits_that_mean_something_are_taken(tmp_path):
    toy_runner(
        tmp_path,
        **clipped(max_norm=float('inf')),
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
        param_scheduler=dict(type='MultiStepLR', milestones=[8, 3], gamma=0),
    ).train()


# Images


def packed(*transforms, **options):
    return GuardedPipeline(transforms, **{'training': False, 'num_classes': None, **options})


@pytest.mark.parametrize('annotated', [False, True])
def test_an_image_that_is_too_large_is_not_even_opened(tmp_path, annotated):
    path = tmp_path / 'large.bmp'
    Image.new('1', (1, 1)).save(path)
    head = bytearray(path.read_bytes())
    head[18:26] = struct.pack('<ii', 20000, 20000)
    path.write_bytes(head)
    data = dict(img_path=str(path), **(dict(width=20000, height=20000) if annotated else {}))
    said = r'large\.bmp is 20000x20000, more than env_cfg\.max_pixels=\d+: .*max_pixels=400000000'

    def loads(_):
        raise AssertionError('it is decoded')

    with pytest.raises(BadSampleError, match=said):
        packed(loads)(data)
    assert packed(dict, max_pixels=400_000_000)(data) == data


def test_the_limit_is_that_of_the_config():
    data = ToyData()
    data.pipeline = Compose([])
    guard(data, True, None, 7)
    assert data.pipeline.max_pixels == 7
    data.pipeline = Compose([])
    guard(data, True)
    assert data.pipeline.max_pixels == bad_samples.MAX_PIXELS < 20000**2


@pytest.mark.parametrize(
    'fault', [MemoryError('64 GiB'), cv2.error('(-4:Insufficient memory) Failed to allocate')]
)
@pytest.mark.parametrize('training', [False, True])
def test_no_memory_for_an_image(fault, training):
    def grows(_):
        raise fault

    said = r'a\.jpg \(9x5\) does not fit into memory in function: .*max_pixels=N'
    data = dict(img_path='a.jpg', width=9, height=5)
    refused(said, packed(grows, training=training), data)


class Starved(ToyModel):
    def forward(self, x, mode='tensor'):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes")


def test_no_memory_for_a_batch_names_its_images(tmp_path):
    from mmdet.structures import DetDataSample

    class Images(ToyData):
        def __getitem__(self, index):
            sample = DetDataSample(metainfo=dict(img_path=f'{index}.jpg', img_shape=(5, 9)))
            return dict(x=torch.zeros(3), data_samples=sample)

    class OnBatches(Starved):
        def train_step(self, data, optim_wrapper):
            return self(data['x'])

    loader = dict(
        dataset=Images(2), sampler=dict(type='DefaultSampler', shuffle=False), batch_size=2
    )
    loader['collate_fn'] = dict(type='pseudo_collate')
    runner = toy_runner(tmp_path, train_dataloader=loader, model=OnBatches())
    with pytest.raises(UsageError, match=r'not enough memory.*batch: 0\.jpg \(9x5\), 1\.jpg'):
        naming_the_remedy(runner.train)


def test_a_tool_names_faults_of_the_machine_from_its_start(capsys):
    def no_thread():
        raise RuntimeError("can't start new thread")

    with pytest.raises(SystemExit) as end:
        run_tool(no_thread)
    assert end.value.code == 2
    assert re.fullmatch(r"error: .*memory.*can't start new thread.*\n", capsys.readouterr().err)


class Killed(ToyData):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(tmp_path):
    loader = dict(dataset=Killed(), sampler=dict(type='DefaultSampler'), batch_size=1)
    runner = toy_runner(tmp_path, train_dataloader=dict(loader, num_workers=1))
    with pytest.raises(UsageError, match='data loading worker failed'):
        naming_the_remedy(runner.train)


@pytest.mark.parametrize(
    ('fault', 'remedy'),
    [
        (
            RuntimeError(
                'Given groups=1, weight of size [8, 1, 4, 4], expected input[2, 3, 8, 8] to have '
                '1 channels, but got 3 channels instead'
            ),
            r'channels than model\.backbone\.in_channels: LoadImageFromFile\(color_type',
        ),
        (KeyError('inputs'), 'must end with PackDetInputs'),
        (RuntimeError('could not create a primitive'), 'not enough memory'),
        (OSError(28, 'No space left on device'), '/dev/shm'),
    ],
)
def test_more_faults_say_what_to_do(fault, remedy):
    def fail():
        raise fault

    refused(remedy, naming_the_remedy, fail)
