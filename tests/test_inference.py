"""The inferencers of mmdet and mmseg with checkpoints of our training, against the bare model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from PIL import Image

from idlevit_mm.checkpoints import config_text
from idlevit_mm.errors import UsageError

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

ROOT = Path(__file__).parents[1]
NAMES = {'detection': 'mask-rcnn_idle-swin_digits', 'segmentation': 'fpn_idle-pvtv2_digits'}
FOLDERS = {'detection': 'coco/val', 'segmentation': 'ade/images/validation'}
EXAMPLES = re.findall(
    r'```python\n(.*?)```', (ROOT / 'docs' / 'inference.md').read_text(encoding='utf-8'), re.S
)


def config_of(task):
    return str(ROOT / 'configs' / 'digit_scenes' / f'{NAMES[task]}.py')


@pytest.fixture(scope='module')
def trained(scene_config, tmp_path_factory):
    """Path of a checkpoint that one iteration of training wrote, by task."""

    def train(task):
        cfg = scene_config(NAMES[task])
        cfg.work_dir = str(tmp_path_factory.mktemp(task))
        cfg.experiment_name = f'inference_{task}'
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.param_scheduler = []
        cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
        Runner.from_cfg(cfg).train()
        return f'{cfg.work_dir}/iter_1.pth'

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        return {task: train(task) for task in NAMES}


@pytest.fixture
def model_of(scene_config, trained):
    """The bare model of a task, and its validation set."""

    def build(task):
        cfg = scene_config(NAMES[task])
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model).eval()
            data = DATASETS.build(cfg.val_dataloader.dataset)
        state = torch.load(trained[task], weights_only=True)['state_dict']
        model.load_state_dict(state)
        return model, data

    return build


def by_hand(model, item):
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([item]))
    return result


def from_array(image, item):
    """An item of a data set with another image, of its own size, in place."""
    sample = item['data_samples'].clone()
    sample.set_metainfo(dict(img_shape=image.shape[:2], ori_shape=image.shape[:2]))
    return dict(inputs=torch.from_numpy(image.transpose(2, 0, 1).copy()), data_samples=sample)


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (61, 95, 3), dtype=np.uint8)


def test_det_inferencer(model_of, trained, scenes, noise, tmp_path):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    model, data = model_of('detection')
    folder = scenes / FOLDERS['detection']
    files = sorted(str(path) for path in folder.iterdir())
    wanted = [by_hand(model, data[i]).pred_instances for i in range(3)]
    assert all(len(instances) for instances in wanted)

    inferencer = DetInferencer(config_of('detection'), trained['detection'], device='cpu')
    assert inferencer.visualizer.dataset_meta['classes'][:2] == ('zero', 'one')

    def check(inputs, expected, **arguments):
        results = inferencer(inputs, out_dir=str(tmp_path), **arguments)['predictions']
        assert len(results) == len(expected)
        for result, instances in zip(results, expected, strict=True):
            assert result['labels'] == instances.labels.tolist()
            assert np.allclose(result['scores'], instances.scores, atol=1e-5)
            assert np.allclose(result['bboxes'], instances.bboxes, atol=1e-3)

    check(files, wanted)
    check(str(folder), [wanted[files.index(str(folder / n))] for n in os.listdir(folder)])
    assert len(list((tmp_path / 'vis').iterdir())) == 3
    odd = by_hand(model, from_array(noise, data[0])).pred_instances
    check(noise, [odd])
    check([noise, files[1]], [odd, wanted[1]])
    check(
        [noise, noise[:33, :47]],
        [odd, by_hand(model, from_array(noise[:33, :47], data[0])).pred_instances],
    )

    detector = init_detector(config_of('detection'), trained['detection'], device='cpu')
    for inputs, expected in ((files[:2], wanted[:2]), ([noise], [odd])):
        results = inference_detector(detector, inputs)
        for result, instances in zip(results, expected, strict=True):
            assert torch.equal(result.pred_instances.bboxes, instances.bboxes)
            assert torch.equal(result.pred_instances.masks, instances.masks)


@pytest.mark.parametrize('task', NAMES)
def test_inferencers_and_the_config_in_a_checkpoint(task, trained, noise, tmp_path):
    """It does not run by itself; printed and named, it is used."""
    from mmdet.apis import DetInferencer
    from mmseg.apis import MMSegInferencer

    inferencer = {'detection': DetInferencer, 'segmentation': MMSegInferencer}[task]
    checkpoint = torch.load(trained[task])
    text = checkpoint['message_hub']['runtime_info']['cfg']
    hostile = f"open({str(tmp_path / 'made')!r}, 'w')\n{text}"
    checkpoint['message_hub']['runtime_info']['cfg'] = checkpoint['meta']['cfg'] = hostile
    torch.save(checkpoint, tmp_path / 'hostile.pth')
    for path in (trained[task], tmp_path / 'hostile.pth'):
        with pytest.raises(UsageError, match=r'without a config.*print_config\.py'):
            inferencer(None, str(path), device='cpu')
    assert not (tmp_path / 'made').exists()

    (tmp_path / 'config.py').write_text(config_text(trained[task]))
    built = inferencer(str(tmp_path / 'config.py'), trained[task], device='cpu')
    name = {'detection': 'IdleSwinTransformer', 'segmentation': 'IdlePyramidVisionTransformerV2'}
    assert type(built.model.backbone).__name__ == name[task]
    arguments = dict(no_save_vis=True) if task == 'detection' else {}
    assert len(built(noise, **arguments)['predictions'])


def test_seg_inferencer(model_of, trained, scenes, noise, tmp_path):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    model, data = model_of('segmentation')
    folder = scenes / FOLDERS['segmentation']
    files = sorted(str(path) for path in folder.iterdir())

    def labels(item):
        return by_hand(model, item).pred_sem_seg.data[0].numpy()

    wanted = [labels(data[i]) for i in range(3)]
    odd = labels(from_array(noise, data[0]))
    assert len(np.unique(np.concatenate([labels.ravel() for labels in wanted]))) > 1

    inferencer = MMSegInferencer(config_of('segmentation'), trained['segmentation'], device='cpu')
    results = inferencer(files, out_dir=str(tmp_path))['predictions']
    assert all(np.array_equal(*pair) for pair in zip(results, wanted, strict=True))
    for file, label_map in zip(files, wanted, strict=True):
        painted = Image.open(tmp_path / 'vis' / Path(file).name)
        assert painted.size == label_map.shape[::-1]
    results = inferencer(str(folder))['predictions']
    assert len(results) == 3
    assert np.array_equal(inferencer(noise)['predictions'], odd)
    results = inferencer([noise, noise[:33, :47]])['predictions']
    assert [result.shape for result in results] == [(61, 95), (33, 47)]
    assert np.array_equal(results[0], odd)

    segmentor = init_model(config_of('segmentation'), trained['segmentation'], device='cpu')
    # Files first: given an array, mmseg changes the config of the model to arrays for good.
    for inputs, expected in ((files[:2], wanted[:2]), ([noise], [odd])):
        results = inference_model(segmentor, inputs)
        for result, label_map in zip(results, expected, strict=True):
            assert np.array_equal(result.pred_sem_seg.data[0].numpy(), label_map)


def test_documented_examples(trained, scenes, tmp_path):
    """In a process of its own, in which nothing but a config imports this package."""
    assert len(EXAMPLES) == 5
    script = ['import sys']
    for example in EXAMPLES:
        task = 'segmentation' if 'mmseg' in example else 'detection'
        images = sorted(str(path) for path in (scenes / FOLDERS[task]).iterdir())
        values = (config_of(task), trained[task], images[0], images)
        script += [f'CONFIG, CHECKPOINT, IMAGE, IMAGES = {values!r}', example]
    script.append("assert 'idlevit_mm' in sys.modules")
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    result = subprocess.run(
        [sys.executable, '-c', '\n'.join(script)],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / 'outputs' / 'preds').glob('*.json'))) == 3
    shares = [float(text) for text in re.findall(r'tensor\((0\.\d+)\)', result.stdout)]
    # A detector pads 70 x 90 pixels to 96 x 96, and padding is idle.
    assert shares == pytest.approx([0.7 * 18 * 23 / 24**2, 0.7], abs=0.01)
