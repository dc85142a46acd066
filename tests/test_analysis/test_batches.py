"""Batches of a config's data, and counting over them."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from idlevit_mm.analysis.models import load_config
from idlevit_mm.errors import UsageError

CONFIGS = Path(__file__).parents[2] / 'configs' / 'digit_scenes'
RETINANET = CONFIGS / 'retinanet_idle-swin_digits.py'


@pytest.fixture
def data_batches(tool):
    return tool('get_flops').data_batches


def retinanet(scenes):
    root = f'{scenes}/coco/'
    phases = {f'{phase}_dataloader.dataset.data_root': root for phase in ('train', 'val', 'test')}
    return load_config(RETINANET, {**phases, 'train_dataloader.batch_size': 3})


@pytest.mark.parametrize(
    ('phase', 'num_images', 'sizes'),
    [('val', None, [3]), ('train', None, [3, 1]), ('train', 2, [3]), ('test', 99, [3])],
)
def test_whole_batches(data_batches, scenes, phase, num_images, sizes):
    pytest.importorskip('mmdet')
    batches = list(data_batches(retinanet(scenes), phase, num_images))
    assert [len(batch['inputs']) for batch in batches] == sizes


def test_the_same_order_again(data_batches, scenes):
    pytest.importorskip('mmdet')
    cfg = retinanet(scenes)

    def order():
        return [
            sample.img_id
            for batch in data_batches(cfg, 'train', None)
            for sample in batch['data_samples']
        ]

    first = order()
    torch.rand(1)
    assert order() == first
    assert len(set(first)) == 4


def test_what_is_refused(data_batches):
    cfg = Config({})
    with pytest.raises(UsageError, match='no val_dataloader'):
        data_batches(cfg, 'val', None)
    with pytest.raises(ValueError, match='num_images=0'):
        data_batches(cfg, 'val', 0)


def test_counting_over_a_data_set(scenes, run_tool, tmp_path, capsys):
    pytest.importorskip('mmdet')
    out = tmp_path / 'counts.json'
    arguments = (RETINANET, '--data', '--keep-ratios', 1, 0.5, '--out', out)
    option = f'val_dataloader.dataset.data_root={scenes}/coco/'
    assert run_tool('get_flops', *arguments, '--cfg-options', option) == 0
    dense, idle = json.loads(out.read_text()).values()
    assert dense['images'] == 3
    assert dense['share_active'] == 1.0
    # Half of the tokens of 70 x 90 pixels, in maps of 96 x 96.
    shares = [
        round(0.5 * math.ceil(70 / stride) * math.ceil(90 / stride)) / (96 // stride) ** 2
        for stride in (4, 8, 16, 32)
    ]
    assert idle['share_active'] == pytest.approx(sum(shares) / 4)
    assert idle['parts']['backbone'] < 0.6 * dense['parts']['backbone']
    assert idle['parts']['bbox_head'] == dense['parts']['bbox_head']
    parts = ('backbone', 'neck', 'bbox_head')
    assert sum(dense['parts'][part] for part in parts) == dense['parts']['total']
    assert '3 images of val' in capsys.readouterr().out

    # The images are all of one size: 70 x 90, padded to a multiple of 32.
    by_shape = tmp_path / 'shape.json'
    shapes = ('--shape', '96x96', '64x64', '--keep-ratios', 1, 0.5)
    assert run_tool('get_flops', RETINANET, *shapes, '--out', by_shape) == 0
    counts = json.loads(by_shape.read_text())
    assert counts['96x96']['keep 1'] == dense['parts']
    assert dense['low'] == dense['high']
    # Noise fills its maps.
    noise = counts['96x96']['keep 0.5']
    assert 0.8 * noise['backbone'] < idle['parts']['backbone'] < 0.9 * noise['backbone']
    assert noise['bbox_head'] == idle['parts']['bbox_head']
    assert counts['64x64']['keep 0.5']['total'] < idle['low'] <= idle['high']


def test_missing_data_are_named(run_tool, capsys):
    pytest.importorskip('mmdet')
    option = 'test_dataloader.dataset.data_root=/nowhere/digit_scenes'
    assert run_tool('get_flops', RETINANET, '--data', 'test', '--cfg-options', option) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: test_dataloader.dataset.data_root /nowhere/digit_scenes')
    assert 'tools/dataset_converters/digit_scenes.py' in error
