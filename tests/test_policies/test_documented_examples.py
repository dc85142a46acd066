"""The examples of docs/backbones.md run as they are printed."""

import re
from pathlib import Path

import pytest
import torch
from backbone_zoo import BY_NAME, FAMILIES, image, randomize, variant_scopes

from idlevit_mm.registry import POLICIES, SCORERS

TEXT = (Path(__file__).parents[2] / 'docs' / 'backbones.md').read_text()
EXAMPLES = ('A scorer of your own', 'A policy of your own')


def code_below(heading):
    """The first code block of a section."""
    section = re.split(r'^## ', TEXT.split(f'## {heading}\n', 1)[1], maxsplit=1, flags=re.M)[0]
    return re.search(r'```python\n(.*?)```', section, re.S).group(1)


@pytest.fixture(autouse=True, scope='module')
def _examples():
    """Registers what the examples define, and takes it out again."""
    before = [dict(registry.module_dict) for registry in (POLICIES, SCORERS)]
    for heading in EXAMPLES:
        exec(code_below(heading), {'__name__': 'example'})
    yield
    for registry, modules in zip((POLICIES, SCORERS), before, strict=True):
        registry.module_dict.clear()
        registry.module_dict.update(modules)


@pytest.mark.parametrize(('variant', 'scope'), variant_scopes(FAMILIES))
def test_policy_of_your_own(variant, scope):
    policy = dict(type='TurnAbout', scorer='mean_query', scope=scope)
    model = randomize(variant.build(keep_ratios=0.6, policy=policy, drop_path_rate=0.0)).train()
    outs = model(image((3, 3, 45, 58)))
    sum(out.square().sum() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert all(p.grad is not None for p in model.parameters())
    if scope == 'map':
        for stage in model.keep_masks:
            for before, after in zip(stage, stage[1:], strict=False):
                assert not before.all()
                assert (before | after).all(), 'who idled before does not go first'


def test_policy_of_your_own_takes_the_keys_of_the_others():
    with pytest.raises(
        TypeError, match="unknown key 'turn'; allowed: type, scorer, scope, rounding"
    ):
        BY_NAME['pvt'].build(policy=dict(type='TurnAbout', turn=2))


@pytest.mark.parametrize('policy', ['IdleViT', 'EViT', 'TurnAbout'])
def test_scorer_of_your_own(policy):
    variant = BY_NAME['pvt']
    config = dict(type=policy, scorer='brightest')
    model = randomize(variant.build(keep_ratios=0.4, policy=config)).eval()
    block = model.layers[0][1][1]
    x = torch.randn(2, 35, 8)
    selection = block.policy.plan(x, (5, 7), 0.4, block)[0].selection
    assert torch.equal(selection.token_ids, x.amax(-1).topk(14).indices.sort().values)
