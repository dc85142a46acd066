"""What holds for every policy, each where it acts; the rules themselves are in ``test_pure``."""

import copy
import pickle
from itertools import cycle

import pytest
import torch
from backbone_zoo import (
    BlockTrace,
    all_equal,
    assert_all_close,
    assert_close,
    assert_same_gradients,
    gradients,
    image,
    stage_blocks,
)
from policy_cases import BY_CASE, CASE_FAMILIES, CASES, CORE, OWN, SCOPES, Case, each
from torch import nn

from idlevit_mm.blocks import Carried, Tokens
from idlevit_mm.ops import row_mask
from idlevit_mm.registry import POLICIES

ODD = (3, 3, 45, 58)
SIZES = [ODD, (1, 3, 4, 40), (3, 3, 40, 4), (1, 3, 4, 4)]
# One case of each family.
ONE = [name for name in BY_CASE if name.endswith('idlevit-map')]


def test_every_registered_policy_has_a_case():
    published = {
        name for name, cls in POLICIES.module_dict.items() if 'idlevit_mm' in cls.__module__
    }
    assert {case.policy['type'] for case in CASES} == published
    assert {case.policy['type'] for case in CORE} == published


def test_cases_are_named_apart():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 30
    assert all(isinstance(case, Case) for case in CASES)


@torch.no_grad()
@each([*SCOPES, *OWN, *(case for case in CASES if case.variant.name in ('pvt', 'vit-no-cls'))])
def test_inference(case):
    """An image is as alone whatever is beside it or was before it; and ratios act at once."""
    model, dense, x = case.build(), case.build(keep=1.0), image(ODD)
    x[1] *= 4
    for size in SIZES[1:]:
        outs, want = model(image(size)), dense(image(size))
        assert [out.shape for out in outs] == [out.shape for out in want]
        assert all(out.isfinite().all() for out in outs)
        assert list(map(len, model.keep_masks)) == list(map(len, stage_blocks(model)))
    together, masks = model(x), sum(model.keep_masks, [])
    assert all_equal(together, case.build()(x)), 'images before it leave a trace'
    assert not torch.equal(together[-1], dense(x)[-1])
    for i in range(3):
        alone = model(x[i : i + 1])
        for a, b in zip(sum(model.keep_masks, []), masks, strict=True):
            assert torch.equal(a[0], b[i])
        for a, b in zip(alone, together, strict=True):
            assert_close(a[0], b[i], 1e-5)
    model.set_keep_ratios(case.ratios(0.2))
    few = model(x)
    assert int(model.keep_masks[0][-1].sum()) < int(masks[case.variant.depths[0] - 1].sum())
    assert not torch.equal(together[-1], few[-1])
    model.set_keep_ratios(case.ratios())
    assert all_equal(model(x), together)


LEARNED = [f'{name}-idlevit-map-learned' for name in CASE_FAMILIES]


@each([*ONE, *SCOPES[1:3], 'swin-idlevit-map-learned', 'swin-sparsevit', 'vit-evit', 'vit-evovit'])
def test_ratio_of_one_is_the_dense_backbone_bit_for_bit(case):
    model = case.build(1.0, drop_path_rate=0.0)
    dense = case.variant.build(drop_path_rate=0.0)
    dense.load_state_dict(model.state_dict(), strict='learned' not in case.name)
    for train in (False, True):
        model.train(train)
        dense.train(train)
        for size in SIZES:
            assert all_equal(model(image(size)), dense(image(size)))
            assert all(mask.all() for stage in model.keep_masks for mask in stage)


@each([*SCOPES, *OWN])
def test_all_tokens_active_equals_the_dense_backbone(case):
    """A ratio just below 1 is no jump: a summary of no token changes nothing; nor do gradients."""
    model = case.build(case.ratios(0.9999), policy=dict(attention_ratios=None)).double()
    x = image((2, 3, 45, 58), dtype=torch.float64)
    outs, grads = gradients(model, x)
    assert all(mask.all() for stage in model.keep_masks for mask in stage)
    model.set_keep_ratios(1.0)
    dense_outs, dense_grads = gradients(model, x)
    assert_all_close(outs, dense_outs, 1e-10)
    if case in SCOPES:
        assert_same_gradients(grads, dense_grads, 1e-10)


HALVES = torch.bfloat16, torch.float16


def halves(cases):
    """``parametrize`` over cases, in one precision and in the other by turns."""
    pairs = list(zip(cases, cycle(HALVES), strict=False))
    ids = [f'{case.name}-{str(dtype)[6:]}' for case, dtype in pairs]
    return pytest.mark.parametrize(('case', 'dtype'), pairs, ids=ids)


@halves([*SCOPES, *OWN, *map(BY_CASE.get, ('pvt-evit', 'pvt-evovit', *LEARNED))])
def test_every_parameter_gets_a_gradient(case, dtype):
    """Distributed training refuses parameters without one; at 1.0 and under autocast too."""
    x, model = image(ODD), case.build(drop_path_rate=0.0).train()
    for keep in (case.ratios(1e-4), 1.0, case.ratios()):
        model.set_keep_ratios(keep)
        _, grads = gradients(model, x)
        for name, grad in grads.items():
            assert grad is not None, f'{name} has no gradient'
            assert grad.isfinite().all(), name
            if keep != case.ratios(1e-4):
                assert grad.abs().max() > 0, f'{name} has only zero gradients'
    model.zero_grad()
    plain, masks = model(x), sum(model.keep_masks, [])
    with torch.autocast('cpu', dtype):
        outs = model(x)
    sum(out.float().square().mean() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert [out.shape for out in outs] == [out.shape for out in plain]
    if not case.by_class_attention:
        assert [int(m.sum()) for m in sum(model.keep_masks, [])] == [int(m.sum()) for m in masks]
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    if case in SCOPES:
        model.set_keep_ratios(1.0)
        with torch.autocast('cpu', dtype):
            outs = model(x)
        with torch.no_grad():
            assert_close(outs[0].float(), model(x)[0], 0.1)


@each(
    [
        'swin-idlevit-map', 'swin-idlevit-summary', 'swin-evit', 'swin-evovit', 'swin-sparsevit',
        'vit-idlevit-map', 'vit-evit-norm', 'vit-evovit-norm', 'pvtv2-idlevit-summary',
    ]
)  # fmt: skip
def test_autocast_ranks_in_float32(case):
    """A block ranks what enters it as it would without autocast."""
    model = case.build()
    block = stage_blocks(model)[0][-1]
    x, hw = tokens_for(block, (9, 11))
    exact = block(x, hw, 0.6)[1].plan
    with torch.autocast('cpu', torch.bfloat16):
        rounded = block(x, hw, 0.6)[1].plan
    assert torch.equal(exact.rows.ids, rounded.rows.ids)
    if exact.summary is not None:
        # The class token's query is folded with the keys there: other roundings.
        assert_close(rounded.summary, exact.summary, 1e-6)


def tokens_for(block, hw, batch=2, dtype=torch.float32):
    """Tokens that enter a block, and the size of their map."""
    count = hw[0] * hw[1] + block.num_class
    channels = block.policy.scorer.embed_dims
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, count, channels, generator=generator, dtype=torch.float64)
    return x.to(dtype), hw


SCORERS = (
    'mean_distance', 'activation_norm', 'random', 'uniform_grid', 'learned', 'local_contrast',
)  # fmt: skip


@halves(
    [
        *(case for case in SCOPES if case.policy['scope'] == 'map'),
        *(Case(f'swin-{s}', SCOPES[0].variant, dict(scorer=s)) for s in SCORERS),
        *(
            BY_CASE[name]
            for name in BY_CASE
            if name.endswith(('evovit', 'vit-evit', 'vit-idlevit'))
        ),
    ]
)
def test_whole_model_in_another_precision(case, dtype):
    model = case.build().to(dtype)
    for keep in (case.ratios(), 1.0):
        model.set_keep_ratios(keep)
        outs = model(image((1, 3, 45, 58), dtype=dtype))
        assert all(out.dtype == dtype and out.isfinite().all() for out in outs)


@each(OWN)
def test_gradients_of_one_block(case):
    """Numerical against analytical, with ranks and weights that do not depend on the input."""
    policy = {} if case.by_class_attention else dict(scorer='uniform_grid')
    model = case.build(policy=policy).double()
    block = stage_blocks(model)[0][-1]
    x, hw = tokens_for(block, (3, 5), batch=2, dtype=torch.float64)
    state = block(x, hw, 1.0)[1].state if case.by_class_attention else None
    state = state.detach() if isinstance(state, torch.Tensor) else state
    names = [name for name, _ in block.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in block.parameters())

    class Settled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            x, carried = self.block(x, hw, 0.5, Carried(state=state))
            return settled(self.block, x, hw, carried)

    whole = Settled()

    def forward(x, *values):
        parameters = {f'block.{n}': value for n, value in zip(names, values, strict=True)}
        return torch.func.functional_call(whole, parameters, (x,))

    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *values), fast_mode=True)


def settled(block, x, hw, carried):
    return block.settled(Tokens(x, hw, carried.pack))


@torch.no_grad()
@pytest.mark.usefixtures('each_window_path')
@each(['swin-idlevit-context', 'vit-idlevit-context', 'vit-no-cls-idlevit-context'])
def test_where_all_are_context_active_tokens_are_as_in_the_dense_block(case):
    """Their keys are those of idle tokens too, and nothing else in a block mixes tokens."""
    for block in stage_blocks(case.build().double())[0][-2:]:
        x, hw = tokens_for(block, (9, 11), dtype=torch.float64)
        dense = block(x, hw, 1.0)[0]
        out, (_, plan, *_) = block(x, hw, 0.4)
        active = row_mask(plan.rows, x.shape[1])
        active[:, 99:] = True  # class tokens
        assert_close(out[active], dense[active], 1e-11)
        assert torch.equal(out[~active], x[~active])


def passing(case):
    """Whether idle tokens pass unchanged."""
    return case.policy['type'] != 'EvoViT' or not case.policy.get('representative', True)


@each(case for case in CASES if passing(case) and (case in OWN or case.policy['type'] != 'IdleViT'))
def test_idle_rows_are_bit_identical(case):
    for train in (False, True):
        model = case.build(drop_rate=0.1, drop_path_rate=0.2).train(train)
        with BlockTrace(model) as trace:
            model(image(ODD))
        some_idle = False
        for s, stage in enumerate(model.keep_masks):
            for b, mask in enumerate(stage):
                x, out, _ = trace.calls[s][b]
                idle = ~mask.flatten(1)
                if case.by_class_attention and case.policy['type'] == 'EViT' and b:
                    # Those that leave in this block still have what its attention added.
                    idle &= ~model.keep_masks[s][b - 1].flatten(1)
                some_idle |= bool(idle.any())
                assert torch.equal(out[idle], x[idle])
                if not train:
                    moved = (out != x).any(-1)
                    assert moved[mask.flatten(1)].all()
        assert some_idle


# Compilation takes seconds.
def shallow(case):
    """A model that compiles fast."""
    if case.variant.is_plain:
        few = dict(num_layers=2, out_indices=(1,), drop_path_rate=0.0)
        if case.variant.is_vitdet:
            return case.build(0.5, window_block_indexes=(0,), **few)
        return case.build([[1.0, 0.5]], **few)
    swin = dict(depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,), drop_path_rate=0.0)
    return case.build(0.5, **swin)


@each(['swin-idlevit-windows', 'swin-evovit', 'vit-evit', 'vitdet-evovit'])
def test_compiled_trains_as_eager(case):
    torch._dynamo.reset()
    model, x = shallow(case).train(), image((2, 3, 45, 58))
    outs, grads = gradients(model, x)
    compiled_outs, compiled_grads = gradients(torch.compile(model, backend='aot_eager'), x)
    assert_all_close(compiled_outs, outs, 1e-5)
    compiled_grads = {name.removeprefix('_orig_mod.'): g for name, g in compiled_grads.items()}
    assert_same_gradients(compiled_grads, grads, 1e-5)


@each(['vit-evovit'])
def test_compiled_equals_eager(case):
    torch._dynamo.reset()
    model = shallow(case)
    compiled = torch.compile(model, backend='aot_eager')
    with torch.no_grad():
        for size in ((1, 3, 46, 61), (2, 3, 53, 47)):
            got, masks = compiled(image(size)), model.keep_masks
            assert_all_close(got, model(image(size)), 1e-5)
            assert all_equal(masks[0], model.keep_masks[0])


@each(['swin-sparsevit', 'pvt-evit', 'vit-evovit', 'vit-idlevit-map-learned'])
def test_copies_after_a_training_forward(case):
    model = case.build().train()
    x = image((1, 3, 45, 58))
    model(x)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.eval()
    for twin in twins:
        with torch.no_grad():
            assert all_equal(twin.eval()(x), model(x))
        twin.set_keep_ratios(1.0)
        assert model.keep_ratios == case.ratios()


STATEFUL = [
    'swin-sparsevit', 'swin-evit', 'swin-evovit', 'pvtv2-evit', 'pvtv2-evovit', 'vit-evit',
    'vit-evovit', 'vit-evit-norm', 'vit-evovit-norm',
]  # fmt: skip


class Twice(nn.Module):
    """Runs a backbone twice, as detectors with shared backbones do."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return [a + b for a, b in zip(self.backbone(x), self.backbone(x.flip(-1)), strict=True)]


@each(STATEFUL)
def test_two_forwards_before_one_backward(case):
    model = case.build(with_cp=True, drop_path_rate=0.0).double().train()
    x = image((1, 3, 45, 58), dtype=torch.float64)
    _, both = gradients(Twice(model), x)
    _, first = gradients(model, x)
    _, second = gradients(model, x.flip(-1))
    second['input'] = second['input'].flip(-1)
    both = {key.removeprefix('backbone.'): grad for key, grad in both.items()}
    assert_same_gradients(both, {key: grad + second[key] for key, grad in first.items()}, 1e-9)
