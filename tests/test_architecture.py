"""docs/architecture.md is enough to add a scorer, a policy, a backend and a family."""

import re
from pathlib import Path

import pytest
import torch
from backbone_zoo import BY_NAME, FAMILIES, image, randomize, variant_scopes
from mmengine.registry import MODELS

from idlevit_mm import kernels
from idlevit_mm.policies import build_policy
from idlevit_mm.registry import POLICIES, SCORERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / 'docs' / 'architecture.md').read_text()
EXAMPLES = ('A scorer', 'A policy', 'A family')


def code_below(heading):
    """The code block of a section."""
    section = re.split(r'^## ', TEXT.split(f'## {heading}\n', 1)[1], maxsplit=1, flags=re.M)[0]
    return re.search(r'```python\n(.*?)```', section, re.S).group(1)


@pytest.fixture(autouse=True, scope='module')
def _examples():
    """Registers what the examples define, and takes it out again."""
    registries = POLICIES, SCORERS, MODELS
    before = [dict(registry.module_dict) for registry in registries]
    for heading in EXAMPLES:
        exec(code_below(heading), {'__name__': 'example'})
    yield
    for registry, modules in zip(registries, before, strict=True):
        registry.module_dict.clear()
        registry.module_dict.update(modules)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(kernels.backends, 'BACKENDS', list(kernels.BACKENDS))
    namespace = {'__name__': 'example'}
    code = code_below('A backend').replace('BACKENDS.insert', 'backends.BACKENDS.insert')
    exec('from idlevit_mm.kernels import backends\n' + code, namespace)
    return kernels.backends.BACKENDS[0]


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
    config = dict(type=policy, scorer='brightest')
    assert type(build_policy(config, 8, ('map',)).scorer).__name__ == 'Brightest'
    model = randomize(BY_NAME['pvt'].build(keep_ratios=0.4, policy=config)).eval()
    seen = {}
    block = model.idle_blocks[0][0]
    block.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(image((1, 3, 45, 58)))
    scores = seen['x'].amax(dim=-1)
    mask = model.keep_masks[0][0].flatten(1)
    assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize('ratio', [1.0, 0.5])
@pytest.mark.parametrize('policy', [None, dict(context='all'), dict(type='EvoViT')])
def test_family_of_your_own(policy, ratio):
    model = MODELS.build(
        dict(type='IdleToy', keep_ratios=ratio, policy=policy, frozen_stages=1)
    ).train()
    (out,) = model(image((3, 3, 21, 30)))
    out.square().sum().backward()
    assert out.shape == (3, 16, 6, 8)
    assert out.isfinite().all()
    gradients = {name: p.grad is not None for name, p in model.named_parameters()}
    frozen = {name for name in gradients if name.startswith(('patch_embed.', 'layers.0.'))}
    assert {name for name, there in gradients.items() if not there} == frozen
    kept = [mask.float().mean().item() for mask in model.keep_masks[0]]
    assert kept == [ratio] * 3


def test_family_of_your_own_equals_its_block_token_by_token():
    model = MODELS.build(dict(type='IdleToy', keep_ratios=0.25)).double().eval()
    x = image((1, 3, 16, 20)).double()
    (out,) = model(x)
    tokens, _ = model.patch_embed(x)
    for block, mask in zip(model.layers, model.keep_masks[0], strict=True):
        rows = mask.flatten().nonzero().squeeze(1)
        active = tokens[:, rows]
        active = active + block.attn(block.norm1(active))[0]
        active = block.ffn(block.norm2(active), identity=active)
        tokens = tokens.index_copy(1, rows, active)
    torch.testing.assert_close(out.flatten(2).transpose(1, 2), tokens, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', ['swin', 'pvtv2', 'svt', 'vit', 'vitdet'])
def test_backend_of_your_own(name, backend, monkeypatch):
    variant = BY_NAME[name]
    model = randomize(variant.build(keep_ratios=0.6)).eval()
    x, calls = image((2, 3, 45, 58)), []
    with torch.no_grad(), kernels.use_backend('reference'):
        expected = model(x)
    half = type(backend).mlp_half
    monkeypatch.setattr(
        type(backend), 'mlp_half', lambda self, *args: calls.append(half(self, *args)) or calls[-1]
    )
    with torch.no_grad():
        outs = model(x)
    assert len(calls) == sum(map(len, model.keep_ratios))
    assert all(calls)
    for own, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(own, other)
    taken = kernels.backend_for(kernels.site_of(x))
    assert taken.name == 'cpu', 'gradients are wanted here'
    assert kernels.why_not(kernels.site_of(x))['packed'] == 'it is for inference'


def test_page_names_every_room():
    package = ROOT / 'idlevit_mm'
    rooms = {path.parent.name for path in package.glob('*/__init__.py')}
    periphery = {'analysis', 'datasets', 'visualization'}
    assert all(f'`{room}/`' in TEXT for room in rooms - periphery)
