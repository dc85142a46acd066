"""Tools and pictures of models whose images have one channel or four."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbone_zoo import parametrize
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope

from idlevit_mm.analysis.flops import backbone_multiply_adds
from idlevit_mm.analysis.models import image_channels, load_model, noise_image
from idlevit_mm.hooks import ActiveTokensVisualizationHook
from idlevit_mm.visualization.data_samples import picture_of

pytest.importorskip('mmseg')


@TRANSFORMS.register_module()
class OfChannels:
    """Gives an image so many channels, in place of a file that has them; one as files of grey."""

    def __init__(self, channels):
        self.channels = channels

    def __call__(self, results):
        image = results['img']
        chosen = image[..., np.arange(self.channels) % 3]
        results['img'] = chosen[..., 0] if self.channels == 1 else chosen
        return results


@pytest.fixture(params=[1, 4])
def channels(request):
    return request.param


@pytest.fixture
def config(channels, scene_config, tmp_path):
    cfg = scene_config('fpn_idle-pvt_digits')
    cfg.custom_imports = dict(imports=['idlevit_mm'])
    cfg.model.backbone.update(in_channels=channels, embed_dims=8, num_layers=[1] * 4)
    cfg.model.neck.in_channels = [8, 16, 32, 64]
    # One mean serves all channels; mmengine's fork takes no four.
    cfg.model.data_preprocessor.update(mean=[120.0], std=[60.0], bgr_to_rgb=False)
    for phase in ('train', 'val', 'test'):
        steps = cfg[f'{phase}_dataloader'].dataset.pipeline
        steps.insert(1, dict(type='OfChannels', channels=channels))
    path = tmp_path / 'net.py'
    cfg.dump(str(path))
    return path


@parametrize()
def test_noise_has_the_channels_of_the_model(variant):
    for channels in (1, 4):
        backbone = variant.build(in_channels=channels, keep_ratios=0.5)
        assert image_channels(backbone) == channels
        image = noise_image((37, 41), model=backbone, batch=2)
        assert image.shape == (2, channels, 37, 41)
        assert noise_image((3, 37, 41), model=backbone).shape == (1, 3, 37, 41)
        assert backbone_multiply_adds(backbone, (37, 41)) > 0


def test_tools_take_it(run_tool, config, channels, tmp_path, capsys):
    size = ['--shape', '61x93', '--out', tmp_path / 'out.json']
    assert run_tool('get_flops', config, *size) == 0
    assert json.loads((tmp_path / 'out.json').read_text())['61x93']['as configured']['total'] > 0
    assert run_tool('get_flops', config, '--data', '--num-images', 2) == 0
    assert run_tool('profile_blocks', config, *size[:2], '--rounds', 1, '--warmup', 0) == 0
    assert f'(1, {channels}, 61, 93)' in capsys.readouterr().out
    options = ['--against-own', '--rounds', 1, '--warmup', 0, '--batches', 2]
    assert run_tool('benchmark', config, '--shapes', '61x93', *options) == 0


def test_pictures_show_it(tool, config, channels, tmp_path):
    model = load_model(config)
    with DefaultScope.overwrite_default_scope('mmseg'):
        paths = tool('draw_active_tokens').draw({'Found': model}, tmp_path / 'sheets', count=1)
        data = DATASETS.build(model.cfg.train_dataloader.dataset)[0]
    assert paths[0].stat().st_size > 0
    assert data['inputs'].shape[0] == channels

    pictures = {}
    gallery = SimpleNamespace(
        dataset_meta=model.dataset_meta,
        add_image=lambda name, image, step: pictures.update({name: image}),
    )
    runner = SimpleNamespace(
        model=model, visualizer=gallery, iter=0, logger=logging.getLogger(), log_dir=None
    )
    hook, batch = ActiveTokensVisualizationHook(train_interval=1), pseudo_collate([data])
    hook.before_run(runner)
    hook.before_train_iter(runner, 0, batch)
    with torch.no_grad():
        model.backbone(data['inputs'][None].float())
    hook.after_train_iter(runner, 0, batch, None)
    assert pictures['train_active_tokens'].shape[-1] == 3


def test_colours_of_packed_images():
    pixels = np.arange(4 * 2 * 3).reshape(4, 2, 3)
    assert np.array_equal(picture_of(pixels), pixels[[2, 1, 0]].transpose(1, 2, 0))
    assert np.array_equal(picture_of(pixels[:1]), pixels[[0, 0, 0]].transpose(1, 2, 0))
