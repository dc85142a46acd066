"""Which part of a block is charged for what."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backbone_zoo import BY_NAME, image, parametrize
from torch import nn

from idlevit_mm.kernels import BACKENDS

CONFIGS = Path(__file__).parents[2] / 'configs' / 'digit_scenes'


@pytest.fixture
def blocks(tool):
    return tool('profile_blocks')


@parametrize()
def test_parts_add_up_and_nothing_stays(blocks, variant):
    model = variant.build(keep_ratios=0.5).eval()
    inputs = image((1, 3, 70, 90))
    with torch.no_grad():
        before = model(inputs)
    found = {
        mode: blocks.profile_blocks(model, inputs, mode, rounds=1, warmup=0)
        for mode in ('inference', 'training')
    }
    assert not model.training
    assert not any('forward' in vars(block) for stage in model.idle_blocks for block in stage)
    assert not any(vars(backend) for backend in BACKENDS)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        after = model(inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for mode, profile in found.items():
        assert len(profile['seconds_of_stages']) == len(model.idle_blocks)
        for stage in profile['seconds_of_stages']:
            assert list(stage) == blocks.PARTS
            assert min(stage.values()) > 0
        assert profile['seconds_outside_blocks'] > 0
        assert (profile['seconds_backward'] is not None) == (mode == 'training')
        assert 0 < profile['idling_share'] < 1


def test_each_moment_belongs_to_the_innermost_part(blocks):
    class Event(SimpleNamespace):
        __hash__ = object.__hash__

    def made(name, own, parent=None):
        cpu = torch.autograd.DeviceType.CPU
        return Event(name=name, cpu_parent=parent, self_cpu_time_total=own, device_type=cpu)

    block = made('idle|1|rest', 1e6)
    attend = made('idle|1|attention, rest', 2e6, block)
    core = made('idle||attention core', 3e6, attend)
    events = [block, attend, core, made('aten::add', 4e6, core), made('idle||gathering', 5e6)]
    backward = made('autograd::engine::evaluate_function: x', 6e6)
    events += [backward, made('idle|1|rest', 7e6, backward)]
    assert blocks.charges(events) == {
        (1, 'rest'): 1,
        (1, 'attention, rest'): 2,
        (1, 'attention core'): 7,
        (-1, blocks.OUTSIDE): 5,
        (-1, blocks.BACKWARD): 13,
    }


def test_scoring_with_the_layers_of_the_block_is_scoring(blocks, monkeypatch):
    model = BY_NAME['swin'].build(keep_ratios=[1.0, 0.5], policy=dict(scorer='mean_query'))
    for block in model.idle_blocks[1]:
        query = block.mean_query
        monkeypatch.setattr(
            block, 'mean_query', lambda *args, query=query: (time.sleep(0.05), query(*args))[1]
        )
    found = blocks.profile_blocks(model, image((1, 3, 64, 64)), rounds=1, warmup=1)
    # A sleep is as long on any machine, or longer.
    assert found['seconds_of_stages'][1]['scoring'] > 0.05 * len(model.idle_blocks[1])


def test_what_cannot_be_profiled(blocks):
    with pytest.raises(ValueError, match='rounds=0'):
        blocks.profile_blocks(BY_NAME['swin'].build(), image((1, 3, 64, 64)), rounds=0)
    with pytest.raises(TypeError, match='idle backbone'):
        blocks.profile_blocks(nn.Conv2d(3, 3, 1), image((1, 3, 8, 8)))


def test_the_tool(run_tool, blocks, tmp_path, capsys):
    pytest.importorskip('mmdet')
    out = tmp_path / 'blocks.json'
    config = CONFIGS / 'retinanet_idle-swin_digits.py'
    arguments = ('--keep-ratios', 0.5, '--shape', '64x96', '--rounds', 1, '--out', out)
    assert run_tool('profile_blocks', config, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf'^\| {part} +\|', printed, re.M) for part in blocks.PARTS)
    profile = json.loads(out.read_text())['profiles']['64x96']
    assert 0 < profile['idling_share'] < 1
    assert len(profile['seconds_of_stages']) == 4
    assert run_tool('profile_blocks', 'no_such_thing') == 2
    assert "target 'no_such_thing'" in capsys.readouterr().err
