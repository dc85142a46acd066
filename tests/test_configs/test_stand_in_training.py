"""Every family trains and is evaluated on stand-ins for COCO and ADE20K, by its own pipelines.

Two iterations of fine-tuning by random ratios and one evaluation, by the code behind
``tools/train.py``; of a detector and a segmentor the same before that, from scratch and with all
tokens. So that this takes seconds, images have an eighth of their size, and with them what grows
with their area: proposals, samples, queries; and a stack has two layers at most. With
``IDLEVIT_MM_TRUE_SIZE=1`` all of that is as it is, and all families train from scratch.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from config_zoo import CONFIGS, build, flat, load, read
from mmengine.config import Config
from mmengine.runner import Runner
from stand_in import write_stand_in

from idlevit_mm.engine.launch import train_from_config

TRUE_SIZE = os.environ.get('IDLEVIT_MM_TRUE_SIZE', '0') not in ('', '0')
SHRINKING = 8
# The smallest member of each family; `{}` is the mode.
FAMILIES = [
    'coco/mask_rcnn/mask-rcnn_idle-swin-t_fpn_1x-{}_coco.py',
    'coco/cascade_mask_rcnn/cascade-mask-rcnn_idle-swin-t_fpn_amp-ms-crop-3x-{}_coco.py',
    'coco/retinanet/retinanet_idle-pvt-t_fpn_1x-{}_coco.py',
    'coco/retinanet/retinanet_idle-pvtv2-b0_fpn_1x-{}_coco.py',
    'coco/dino/dino-4scale_idle-swin-t_8xb2-12e-{}_coco.py',
    'ade20k/upernet/idle-swin-t_upernet_8xb2-160k-{}_ade20k-512x512.py',
    'ade20k/semantic_fpn/fpn_idle-pvt-t_8xb4-40k-{}_ade20k-512x512.py',
    'ade20k/semantic_fpn/fpn_idle-pvtv2-b0_8xb4-40k-{}_ade20k-512x512.py',
    'ade20k/mask2former/mask2former_idle-swin-t_8xb2-160k-{}_ade20k-512x512.py',
    'ade20k/segformer/segformer_idle-mit-b0_8xb2-160k-{}_ade20k-512x512.py',
]
# What a recipe from scratch is, is the same in the others.
FROM_SCRATCH = FAMILIES[2], FAMILIES[-1]
# What fine-tuning logs besides the losses of the model.
ADDED = {'keep_ratio', 'loss_distill_feature'}
# Arguments of transforms that are lengths in pixels, and of models that are numbers of candidates.
LENGTHS = ('scale', 'scales', 'crop_size', 'max_size')
COUNTS = ('num', 'max_per_img', 'nms_pre', 'num_queries', 'num_points')
STACKS = ('depths', 'num_layers')


def scaled(value: Any, divisor: int) -> Any:
    """A number or nested numbers, divided."""
    if isinstance(value, (list, tuple)):
        return type(value)(scaled(item, divisor) for item in value)
    return max(1, round(value / divisor))


def smaller(settings: Any, keys: tuple[str, ...], divisor: int) -> Any:
    """Settings with the values of some keys divided; counts below 64 are not about area."""
    if isinstance(settings, dict):
        return {
            key: scaled(value, divisor)
            if key in keys and not (isinstance(value, int) and value < 64)
            else smaller(value, keys, divisor)
            for key, value in settings.items()
        }
    if isinstance(settings, (list, tuple)):
        return type(settings)(smaller(item, keys, divisor) for item in settings)
    return settings


def shallow(settings: Any) -> Any:
    """Settings with stacks of two layers at most."""
    if isinstance(settings, dict):
        return {
            key: capped(value) if key in STACKS else shallow(value)
            for key, value in settings.items()
        }
    if isinstance(settings, (list, tuple)):
        return type(settings)(map(shallow, settings))
    return settings


def capped(value: Any) -> Any:
    return type(value)(map(capped, value)) if isinstance(value, (list, tuple)) else min(value, 2)


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp('stand-ins')
    write_stand_in('coco', folder / 'coco')
    write_stand_in('ade20k', folder / 'ade')
    return {'mmdet': folder / 'coco', 'mmseg': folder / 'ade' / 'ADEChallengeData2016'}


def child_of(name: str, data: Path, start: Path | None, path: Path) -> str:
    """Write a config that inherits a recipe and states what running it here takes."""
    cfg = load(name)
    settings = cfg.to_dict()
    changes: dict[str, Any] = {}
    for phase, batch_size in (('train', 2), ('val', 1)):
        pipeline = settings[f'{phase}_dataloader']['dataset']['pipeline']
        changes[f'{phase}_dataloader'] = dict(
            batch_size=batch_size,
            num_workers=0,
            persistent_workers=False,
            dataset=dict(
                data_root=str(data),
                pipeline=pipeline if TRUE_SIZE else smaller(pipeline, LENGTHS, SHRINKING),
            ),
        )
    changes['test_dataloader'] = changes['val_dataloader']
    model = settings['model']
    if not TRUE_SIZE:
        model = shallow(smaller(model, COUNTS, SHRINKING**2))
    # Nothing is downloaded.
    model['backbone']['init_cfg'] = None
    final = model['test_cfg'].get('rcnn', model['test_cfg'])
    if 'score_thr' in final:
        # An untrained head is sure of nothing.
        final['score_thr'] = 0.0
    if cfg.default_scope == 'mmdet':
        changes['train_cfg'] = dict(max_epochs=1)
        evaluator = dict(ann_file=str(data / 'annotations' / 'instances_val2017.json'))
        changes['val_evaluator'] = changes['test_evaluator'] = evaluator
    else:
        changes['train_cfg'] = dict(max_iters=2, val_interval=2)
        if not TRUE_SIZE:
            preprocessor = model['data_preprocessor']
            preprocessor['size'] = scaled(preprocessor['size'], SHRINKING)
    changes['model'] = model
    if settings['optim_wrapper']['type'] == 'AmpOptimWrapper' and not torch.cuda.is_available():
        # mmengine refuses it without an accelerator.
        changes['optim_wrapper'] = dict(type='OptimWrapper')
    # What is kept serves as dense weights here, and an optimiser's state is twice as large.
    changes['default_hooks'] = dict(logger=dict(interval=1), checkpoint=dict(save_optimizer=False))
    # Visualisers are global by name.
    changes['visualizer'] = dict(name=str(path))
    if start is not None:
        changes['load_from'] = str(start)
    lines = [f'_base_ = {str(CONFIGS / name)!r}', *(f'{k} = {v!r}' for k, v in changes.items())]
    path.write_text('\n'.join(lines))
    return str(path)


def kinds(settings: Any) -> list[str]:
    """Dotted keys and types of everything that settings name, but for initial weights."""
    leaves = ((key, value) for key, value in flat(settings) if 'init_cfg' not in key)
    return [f'{key} {value}' for key, value in leaves if key.endswith('type')]


@pytest.mark.parametrize('family', FAMILIES)
def test_family_trains_and_is_evaluated(
    family: str, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    name = family.format('dense')
    data = stand_ins[read(name).default_scope]
    config = child_of(name, data, None, tmp_path / 'dense.py')
    if TRUE_SIZE or family in FROM_SCRATCH:
        _, steps = trained(name, config, tmp_path / 'dense')
        assert not any(ADDED & step.keys() for step in steps)
        start = Path((tmp_path / 'dense' / 'last_checkpoint').read_text())
    else:
        start = tmp_path / 'dense.pth'
        model = build(Config.fromfile(config))
        model.init_weights()
        torch.save(dict(state_dict=model.state_dict()), start)
    before = torch.load(start, map_location='cpu')['state_dict']

    name = family.format('random')
    config = child_of(name, data, start, tmp_path / 'random.py')
    runner, steps = trained(name, config, tmp_path / 'random')
    assert all(step.keys() >= ADDED for step in steps)
    assert len({step['keep_ratio'] for step in steps}) == 2
    # Evaluated at the ratio of the config, and trained from the weights it was given.
    first, *others = [r for stage in runner.model.backbone.keep_ratios for r in stage]
    assert (first, set(others)) == (1.0, {0.7})
    after = runner.model.state_dict()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any('backbone' in key for key in moved)
    assert all(torch.allclose(before[k], after[k], atol=1e-3) for k in before if 'norm' in k)


def trained(name: str, config: str, work_dir: Path) -> tuple[Runner, list[dict[str, Any]]]:
    """The runner after a training that is like a recipe's, and the log of its steps."""
    runner = train_from_config(config, work_dir=str(work_dir))
    assert runner.iter == 2
    for part in ('model', 'train_dataloader', 'val_dataloader'):
        assert kinds(runner.cfg[part]) == kinds(read(name)[part])
    (log,) = work_dir.rglob('scalars.json')
    *steps, scores = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(steps) == 2
    assert all(math.isfinite(step['loss']) and step['loss'] > 0 for step in steps)
    metric = 'coco/bbox_mAP' if runner.cfg.default_scope == 'mmdet' else 'mIoU'
    assert 0 <= scores[metric] <= 100
    return runner, steps
