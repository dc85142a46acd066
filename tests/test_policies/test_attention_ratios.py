"""Fewer tokens attend than go through the MLP."""

import re

import pytest
import torch
from backbone_zoo import BY_NAME, all_equal, assert_all_close, image, parametrize, randomize
from policy_cases import FAMILY_NAMES

from idlevit_mm.blocks import idle_work
from idlevit_mm.kernels import use_backend

KEEP, FEW = 0.6, 0.25
POLICIES = 'IdleViT', 'EvoViT'
SCORER = dict(scorer='mean_distance')


def last_of_a_stage(variant, keep):
    """Ratios with one idle block in each stage: what a policy remembers plays no part."""
    return [[1.0] * (depth - 1) + [keep] for depth in variant.depths]


def silenced(model, part):
    """The model with idle blocks whose ``attn`` or ``ffn`` adds nothing."""
    layer = torch.nn.Linear | torch.nn.Conv2d
    for *_, block in model.idle_blocks:
        named = {n: m for n, m in getattr(block, part).named_modules() if isinstance(m, layer)}
        if part == 'attn':  # where what reduces the map comes after the projection
            named = {n: m for n, m in named.items() if n.endswith('proj')}
        last = list(named.values())[-1]
        torch.nn.init.zeros_(last.weight)
        if last.bias is not None:
            torch.nn.init.zeros_(last.bias)
    return model


@pytest.mark.parametrize('part', ['attn', 'ffn'])
@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('name', FAMILY_NAMES)
def test_each_half_is_that_of_its_own_ratio(name, policy, part):
    """Without MLPs few tokens are active, without attention as many as the keep ratio says."""
    variant, outs = BY_NAME[name], []
    x = image((2, 3, 97, 131), dtype=torch.float64)
    cases = [(KEEP, FEW, True), (FEW if part == 'ffn' else KEEP, None, True)]
    # Where no token attends nothing need be silent.
    cases += [(KEEP, 0.0, False)] * (part == 'attn')
    for keep, attention, silent in cases:
        own = dict(type=policy, attention_ratios=attention, **SCORER)
        model = variant.build(keep_ratios=last_of_a_stage(variant, keep), policy=own)
        randomize(model).double().eval()
        outs.append((silenced(model, part) if silent else model)(x))
        shares = [masks[-1].double().mean().item() for masks in model.keep_masks]
        assert shares == pytest.approx([keep] * len(shares), abs=0.06)
    for others in outs[1:]:
        assert_all_close(others, outs[0], tol=1e-12)


@parametrize(tuple(BY_NAME[name] for name in ('swin', 'pvtv2', 'vit-no-cls')))
def test_ratios_are_those_of_blocks(variant):
    """They can be changed, do nothing from the keep ratio on, and dense blocks stay dense."""
    x = image((1, 3, 97, 131))
    ratios = [[FEW] + [0.9] * (depth - 1) for depth in variant.depths]
    model = variant.build(keep_ratios=KEEP, policy=dict(attention_ratios=ratios, **SCORER))
    plain = variant.build(keep_ratios=KEEP, policy=SCORER)
    for one in (model, plain):
        randomize(one).eval()
    own = [block.policy.attention_ratio for stage in model.idle_blocks for block in stage]
    assert own == [ratio for stage in ratios for ratio in stage]
    with torch.no_grad():
        few = model(x)
        assert not all_equal(few, plain(x))
        for keep in (1.0, KEEP):
            for one in (model, plain):
                one.set_keep_ratios(keep, 1.0 if keep == KEEP else None)
            assert all_equal(model(x), plain(x))
        plain.set_keep_ratios(KEEP, ratios)
        assert all_equal(plain(x), few)


@parametrize()
def test_a_block_of_few_that_attend_is_cheaper(variant):
    model = variant.build(keep_ratios=KEEP, policy=SCORER)
    block = model.idle_blocks[0][0]
    works = []
    for ratio in (1.0, FEW, 0.0):
        model.set_keep_ratios(KEEP, ratio)
        works.append(idle_work(block, 2, (40, 64), KEEP))
    assert works[0].products > works[1].products > works[2].products
    assert works[0].pairs > works[2].pairs
    assert works[0].launches > works[2].launches
    assert [work.choices for work in works] == [1, 2, 1]
    assert idle_work(block, 2, (40, 64), 1.0).choices == 0


WRONG = {
    'large': (1.2, {}, ['policy.attention_ratios=1.2', '1.2', '[0, 1]']),
    'negative': (-0.1, {}, ['policy.attention_ratios=-0.1', '-0.1', '[0, 1]']),
    'nan': (float('nan'), {}, ['policy.attention_ratios=nan', '[0, 1]']),
    'length': ([0.5], {}, ['policy.attention_ratios=[0.5]', '1 entries for 2 stages']),
    'EViT': (0.5, dict(type='EViT'), ['policy.attention_ratios', 'EViT', 'IdleViT', 'EvoViT']),
    'stages': (0.5, dict(type='EvoViT', rank_at='stage'), ['policy.attention_ratios', 'rank_at']),
    'SparseViT': (0.5, dict(type='SparseViT'), ['policy.attention_ratios', 'SparseViT']),
}


@pytest.mark.parametrize('case', WRONG)
def test_what_is_refused(case):
    ratios, policy, words = WRONG[case]
    with pytest.raises(ValueError, match='attention_ratios') as error:
        BY_NAME['swin'].build(policy=dict(policy, attention_ratios=ratios))
    assert all(word in str(error.value) for word in words)


def test_class_attention_is_refused():
    with pytest.raises(ValueError, match='scorer other than class_attention'):
        BY_NAME['vit'].build(policy=dict(type='EvoViT', attention_ratios=0.5))


@pytest.mark.parametrize(('few', 'with_cp'), [(FEW, False), (FEW, True), (0.0, True)])
@parametrize(tuple(BY_NAME[name] for name in ('swin', 'pvtv2', 'vit-no-cls')))
def test_all_weights_have_a_gradient(variant, few, with_cp):
    """Distributed training wants one of each; a learned scorer learns from both halves."""
    policy = dict(scorer=dict(type='learned', begins_as='mean_distance'), attention_ratios=few)
    model = randomize(variant.build(keep_ratios=KEEP, policy=policy, with_cp=with_cp)).double()
    x = image((2, 3, 40, 64), dtype=torch.float64).requires_grad_()
    with use_backend('reference'):
        sum(out.square().sum() for out in model.train()(x)).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    still = {name for name, grad in grads.items() if not grad.abs().max() > 0}
    assert still == ({name for name in grads if is_attention(name)} if few == 0.0 else set())


def is_attention(name):
    """Whether a weight is of a block's attention, or of the norm before it."""
    return re.search(r'(\.attn|\.norm1|\.ln1)\.', name) is not None
