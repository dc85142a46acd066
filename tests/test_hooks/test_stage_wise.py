"""Evo-ViT's two phases: every block ranks, then the first of each stage alone."""

import pytest
import torch
from backbone_zoo import BY_NAME, stage_blocks
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from toy import ToyModel, toy_runner

from idlevit_mm.errors import SettingError


class EvoToy(BaseModel):
    """A small PVT on images of the toy data's three numbers, that notes in which phase it is."""

    def __init__(self, rank_at='stage'):
        super().__init__()
        policy = dict(type='EvoViT', rank_at=rank_at)
        self.backbone = BY_NAME['pvt'].build(keep_ratios=0.5, policy=policy)
        self.register_buffer('pattern', torch.rand(3, 33, 47))
        self.phases = {True: [], False: []}

    def forward(self, x, mode='tensor'):
        value = sum(
            out.square().mean()
            for out in self.backbone(torch.stack(list(x))[:, :, None, None] * self.pattern)
        )
        held = {plan.hold for record in self.backbone.records for plan in record.plans}
        assert len(held) == 1
        self.phases[self.training] += held
        return dict(loss=value) if mode == 'loss' else [dict(score=value.item())] * len(x)


@pytest.mark.parametrize(('by_epoch', 'begin'), [(True, 2), (False, 5), (True, 0)])
def test_phases_in_a_run(tmp_path, by_epoch, begin):
    model = EvoToy()
    hook = dict(type='StageWiseHook', begin=begin, by_epoch=by_epoch)
    toy_runner(tmp_path, by_epoch=by_epoch, hooks=[hook], model=model).train()
    begins = begin * 3 if by_epoch else begin
    assert model.phases[True] == [i >= begins for i in range(12 if by_epoch else 10)]
    assert set(model.phases[False]) == {True}
    assert all(block.policy.stage_wise for stage in stage_blocks(model.backbone) for block in stage)


@pytest.mark.parametrize(
    ('model', 'settings', 'message'),
    [
        (ToyModel, dict(begin=1), 'StageWiseHook found no IdleBackbone in ToyModel'),
        (lambda: EvoToy(None), dict(begin=1), 'StageWiseHook needs policy=.*rank_at'),
        (EvoToy, dict(begin=1, loop=False), 'StageWiseHook: by_epoch=True.*by_epoch=False$'),
    ],
)
def test_refused(tmp_path, model, settings, message):
    loop = settings.pop('loop', True)
    hook = dict(type='StageWiseHook', **settings)
    with pytest.raises(SettingError, match=message):
        toy_runner(tmp_path, by_epoch=loop, hooks=[hook], model=model()).train()


def test_wrong_begin():
    for begin in (-1, 1.5, True):
        with pytest.raises(ValueError, match=rf'StageWiseHook.begin={begin} must be'):
            HOOKS.build(dict(type='StageWiseHook', begin=begin))
