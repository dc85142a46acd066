"""Which part of a block or an iteration is charged for what, on a clock that only tests move."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import BY_NAME, image, parametrize
from torch import nn

from idlevit_mm import kernels
from idlevit_mm.analysis import training_profile
from idlevit_mm.analysis.models import load_config
from idlevit_mm.analysis.profile import BLOCK_PARTS, IDLING, idling_share, profile_blocks
from idlevit_mm.analysis.training_profile import (
    DENSE,
    IDLE,
    PARTS,
    profile_training,
    shares,
    watch_gradients,
)
from idlevit_mm.errors import UsageError

CONFIGS = Path(__file__).parents[2] / 'configs' / 'digit_scenes'


class _Clock:
    """Stands still but for what is made slow; ``ticking`` ones gain 1 with each reading."""

    def __init__(self, ticking=False):
        self.now, self.ticking = 0.0, ticking

    def __call__(self):
        self.now += self.ticking
        return self.now

    def slow(self, function, seconds=1.0):
        def slowed(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slowed


@parametrize()
@pytest.mark.parametrize('mode', ['inference', 'training'])
def test_parts_add_up_and_nothing_stays(variant, mode):
    model = variant.build(keep_ratios=0.5)
    inputs = image((1, 3, 70, 90))
    model.eval()
    before, linear = model(inputs), F.linear
    profile = profile_blocks(
        model, inputs, mode=mode, rounds=3, warmup=1, reading=_Clock(ticking=True)
    )
    assert F.linear is linear
    assert not model.training
    assert all('forward' not in vars(block) for stage in model.idle_blocks for block in stage)
    assert all(p.grad is None for p in model.parameters())
    after = model(inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    assert len(profile.stages) == len(model.idle_blocks)
    for stage in profile.stages:
        assert list(stage) == list(BLOCK_PARTS)
        assert min(stage.values()) > 0
    assert profile.blocks['rest'] == sum(stage['rest'] for stage in profile.stages)
    assert (profile.backward is not None) == (mode == 'training')
    assert profile.outside > 0


def test_dense_blocks_neither_score_nor_gather():
    model = BY_NAME['swin'].build(keep_ratios=[1.0, 0.5])
    profile = profile_blocks(model, image((1, 3, 64, 64)), rounds=1, reading=_Clock(ticking=True))
    assert profile.stages[0]['scoring'] == 0
    assert profile.stages[1]['scoring'] > 0


@pytest.mark.parametrize('name', ['swin', 'pvt', 'pvtv2', 'mit'])
@pytest.mark.parametrize('part', ['attention core', 'projections', 'norms'])
def test_who_pays_for_a_function(monkeypatch, name, part):
    clock = _Clock()
    model = BY_NAME[name].build(keep_ratios=0.5, policy=dict(scorer='mean_distance'))
    functions = {
        'attention core': (F, 'scaled_dot_product_attention'),
        'projections': (F, 'linear'),
        'norms': (F, 'layer_norm'),
    }
    if name == 'swin':
        functions['attention core'] = (kernels.cpu, 'attend_squeezed')
    where, function = functions[part]
    monkeypatch.setattr(where, function, clock.slow(getattr(where, function)))
    profile = profile_blocks(model, image((1, 3, 64, 64)), rounds=1, warmup=0, reading=clock)
    paid = {name for name, seconds in profile.blocks.items() if seconds}
    # The feed-forward network has linear layers too, which are its own.
    assert paid - {'feed-forward'} == {part}


def test_who_pays_for_scoring_with_the_layers_of_the_block(monkeypatch):
    clock = _Clock()
    model = BY_NAME['swin'].build(keep_ratios=0.5, policy=dict(scorer='mean_query'))
    blocks = [block for stage in model.idle_blocks for block in stage]
    for block in blocks:
        monkeypatch.setattr(block, 'mean_query', clock.slow(block.mean_query))
        monkeypatch.setattr(block, 'units', clock.slow(block.units, 2.0))
        monkeypatch.setattr(block.attn, 'forward', clock.slow(block.attn.forward, 5.0))
    profile = profile_blocks(model, image((1, 3, 64, 64)), rounds=1, warmup=0, reading=clock)
    parts = {name: seconds for name, seconds in profile.blocks.items() if seconds}
    count = len(blocks)
    assert parts == {'scoring': count, 'selecting': 2 * count, 'attention, rest': 5 * count}
    assert idling_share(profile.blocks) == pytest.approx(3 / 8)
    assert profile.as_dict()['idling_share'] == pytest.approx(3 / 8)


@pytest.mark.parametrize(
    ('arguments', 'message'), [(dict(mode='test'), 'mode='), (dict(rounds=0), 'rounds=0')]
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        profile_blocks(BY_NAME['swin'].build(), image((1, 3, 64, 64)), **arguments)


def test_only_idle_backbones_have_such_blocks():
    with pytest.raises(TypeError, match='idle backbone'):
        profile_blocks(nn.Conv2d(3, 3, 1), image((1, 3, 8, 8)))


def test_tool_for_blocks(run_tool, tmp_path, capsys):
    pytest.importorskip('mmdet')
    out = tmp_path / 'blocks.json'
    config = CONFIGS / 'retinanet_idle-swin_digits.py'
    arguments = ('--keep-ratios', 0.5, '--shape', '64x96', '--rounds', 1, '--out', out)
    assert run_tool('profile_blocks', config, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in IDLING)
    profile = json.loads(out.read_text())['profiles']['64x96']
    assert 0 < profile['idling_share'] < 1
    assert len(profile['seconds_of_stages']) == 4
    assert run_tool('profile_blocks', 'no_such_thing') == 2
    assert "target 'no_such_thing'" in capsys.readouterr().err


class _Noted(torch.autograd.Function):
    """Doubles, and notes its name when the backward pass comes along."""

    @staticmethod
    def forward(ctx, x, name, notes):
        ctx.name, ctx.notes = name, notes
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append(ctx.name)
        return grad * 2, None, None


def test_the_backward_pass_is_cut_between_neck_and_backbone():
    notes = []
    x = torch.ones(3, requires_grad=True)
    first = _Noted.apply(x, 'stage 1', notes)
    # The output of the first stage is also the input of the second, as in PVT.
    second = _Noted.apply(first, 'stage 2', notes)
    unused = _Noted.apply(second, 'stage 3', notes)
    outs = watch_gradients((first, [second], unused), lambda: notes.append('cut'))
    necks = [_Noted.apply(out, 'neck', notes) for out in (outs[0], outs[1][0])]
    sum(necks).sum().backward()
    assert notes == ['neck', 'neck', 'cut', 'stage 2', 'stage 1']
    assert x.grad.tolist() == [4.0 + 8.0] * 3


def test_without_gradients_nothing_is_watched():
    outs = watch_gradients([torch.ones(3)], lambda: None)
    assert torch.equal(outs[0], torch.ones(3))


def _config(name, scenes, layout, **options):
    loading = {'dataset.data_root': f'{scenes}/{layout}/', 'num_workers': 0, 'batch_size': 2}
    loading['persistent_workers'] = False
    options |= {f'train_dataloader.{key}': value for key, value in loading.items()}
    return load_config(CONFIGS / name, options)


@pytest.mark.parametrize(
    ('name', 'layout'),
    [
        ('retinanet_idle-swin_finetune_digits.py', 'coco'),
        ('fpn_idle-pvt_digits.py', 'ade'),
    ],
)
def test_training_iterations(scenes, tmp_path, monkeypatch, name, layout):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    dense_forwards = []
    host_backbone = training_profile.host_backbone

    def watched(*args):
        dense = host_backbone(*args)
        dense.register_forward_hook(lambda module, *_: dense_forwards.append(module.training))
        return dense

    monkeypatch.setattr(training_profile, 'host_backbone', watched)
    cfg = _config(name, scenes, layout)
    # Three iterations of two images are more than the epoch of four images has.
    profile = profile_training(
        cfg, tmp_path, keep_ratios=0.5, iters=2, warmup=1, reading=_Clock(ticking=True)
    )
    assert dense_forwards == [True] * 3
    assert list(profile.parts) == [DENSE, IDLE]
    for model, parts in profile.parts.items():
        assert list(parts) == list(PARTS)
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in parts.values()), parts
        sums = [sum(rounds) for rounds in zip(*parts.values(), strict=True)]
        assert sums == list(profile.iterations.seconds[model])
        assert sum(shares(parts).values()) == pytest.approx(1.0)
    assert not list(tmp_path.rglob('*.pth'))


def test_what_cannot_be_profiled(scenes, tmp_path):
    pytest.importorskip('mmdet')
    name = 'retinanet_idle-swin_digits.py'
    with pytest.raises(UsageError, match='data_root /nowhere/coco/ does not exist'):
        profile_training(_config(name, '/nowhere', 'coco'), tmp_path)
    cfg = _config(name, scenes, 'coco')
    with pytest.raises(ValueError, match='iters=0'):
        profile_training(cfg, tmp_path, iters=0)
    cfg.optim_wrapper = None
    with pytest.raises(UsageError, match='no optim_wrapper'):
        profile_training(cfg, tmp_path)


def test_tool_for_training(scenes, run_tool, tmp_path, capsys):
    pytest.importorskip('mmdet')
    out = tmp_path / 'training.json'
    arguments = ('--keep-ratios', 0.5, '--iters', 1, '--warmup', 0, '--workers', 0, '--out', out)
    options = ('--cfg-options', f'train_dataloader.dataset.data_root={scenes}/coco/')
    config = CONFIGS / 'retinanet_idle-swin_digits.py'
    assert run_tool('profile_training', config, *arguments, *options) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in PARTS)
    record = json.loads(out.read_text())
    assert record['workers'] == 0
    assert len(record['iterations'][IDLE]) == 1
