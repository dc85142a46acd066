"""Dense configs of the demo and of trees become idle, and ask their tools for their data."""

import pytest
from config_zoo import CONFIGS, build, load
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from idlevit_mm.engine.swap import Settings, write_idle_config

NAMES = [
    'demo/retinanet_pvt_scenes',
    'demo/segformer-head_swin_scenes',
    'trees/retinanet_pvt_trees',
]
FROZEN = 'trees/retinanet_dinov2_trees'


@pytest.mark.parametrize('name', NAMES)
def test_idle_twins_have_the_same_weights(name, tmp_path):
    out = tmp_path / 'idle.py'
    write_idle_config(str(CONFIGS / f'{name}.py'), Settings(keep=0.6), str(out))
    dense, idle = build(load(f'{name}.py')), build(Config.fromfile(out))
    shapes = {key: value.shape for key, value in dense.state_dict().items()}
    assert {key: value.shape for key, value in idle.state_dict().items()} == shapes
    assert idle.backbone.keep_ratios[0][0] == 0.6


@pytest.mark.parametrize('name', [*NAMES, FROZEN])
def test_all_paths_lie_in_one_folder(name):
    cfg = load(f'{name}.py')
    roots = {cfg[f'{phase}_dataloader'].dataset.data_root for phase in ('train', 'val', 'test')}
    assert roots == {cfg.data_root}
    for phase in ('val', 'test'):
        assert cfg[f'{phase}_evaluator'].get('ann_file', cfg.data_root).startswith(cfg.data_root)


def test_a_frozen_backbone_learns_nothing_and_the_rest_all():
    cfg = load(f'{FROZEN}.py')
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    moved = {id(p) for group in groups if group['lr'] for p in group['params'] if p.requires_grad}
    rest = {id(p) for part in (model.neck, model.bbox_head) for p in part.parameters()}
    assert moved == rest
