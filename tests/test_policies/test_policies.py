"""What holds for every policy, each where it acts; the rules themselves are in ``test_pure``."""

import copy
import pickle

import pytest
import torch
from backbone_zoo import (
    BlockTrace,
    assert_close,
    assert_same_gradients,
    gradients,
    image,
    stage_blocks,
)
from policy_cases import BY_CASE, CASE_FAMILIES, CASES, CORE, OWN, Case, each
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


@each([*OWN, *(case for case in CASES if case.variant.name in ('pvt', 'vit-no-cls'))])
def test_shapes_and_finite_values(case):
    model, dense = case.build(), case.build(keep=1.0)
    for size in SIZES:
        outs, want = model(image(size)), dense(image(size))
        assert [out.shape for out in outs] == [out.shape for out in want]
        assert all(out.isfinite().all() for out in outs)
        if size == ODD:
            assert not torch.equal(outs[-1], want[-1])
        for stage, blocks in zip(model.keep_masks, stage_blocks(model), strict=True):
            assert len(stage) == len(blocks)


@each([*OWN, 'pvt-evit', 'pvt-evovit', *(f'{name}-idlevit-map-learned' for name in CASE_FAMILIES)])
def test_every_parameter_gets_a_gradient(case):
    """Distributed training refuses parameters without one; at 1.0 too."""
    for keep in (case.ratios(), 1.0, case.ratios(1e-4)):
        model = case.build(keep, drop_path_rate=0.0).train()
        _, grads = gradients(model, image(ODD))
        for name, grad in grads.items():
            assert grad is not None, f'{name} has no gradient'
            assert grad.isfinite().all(), name
            if keep != case.ratios(1e-4):
                assert grad.abs().max() > 0, f'{name} has only zero gradients'


@each([*ONE, 'swin-idlevit-map-learned', 'swin-sparsevit', 'vit-evit', 'vit-evovit'])
def test_ratio_of_one_is_the_dense_backbone_bit_for_bit(case):
    model = case.build(1.0, drop_path_rate=0.0)
    dense = case.variant.build(drop_path_rate=0.0)
    dense.load_state_dict(model.state_dict(), strict='learned' not in case.name)
    for train in (False, True):
        model.train(train)
        dense.train(train)
        for size in SIZES:
            for a, b in zip(model(image(size)), dense(image(size)), strict=True):
                assert torch.equal(a, b)
            assert all(mask.all() for stage in model.keep_masks for mask in stage)


@each(OWN)
def test_all_tokens_active_equals_the_dense_backbone(case):
    """A ratio just below 1 is no jump: a summary of no token changes nothing."""
    model = case.build(case.ratios(0.9999)).double()
    x = image((2, 3, 45, 58), dtype=torch.float64)
    outs = model(x)
    assert all(mask.all() for stage in model.keep_masks for mask in stage)
    model.set_keep_ratios(1.0)
    for a, b in zip(outs, model(x), strict=True):
        assert_close(a, b, 1e-10)


@torch.no_grad()
@each(OWN)
def test_image_does_not_depend_on_its_batch(case):
    model = case.build()
    x = image(ODD)
    x[1] *= 4
    together, masks = model(x), sum(model.keep_masks, [])
    for i in range(3):
        alone = model(x[i : i + 1])
        for a, b in zip(sum(model.keep_masks, []), masks, strict=True):
            assert torch.equal(a[0], b[i])
        for a, b in zip(alone, together, strict=True):
            assert_close(a[0], b[i], 1e-5)


AUTOCAST = [(case, torch.bfloat16) for case in OWN] + [
    (BY_CASE[name], torch.float16)
    for name in (
        'swin-evovit', 'pvt-evit', 'pvtv2-idlevit-map-learned', 'vit-evit', 'vit-no-cls-evovit',
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ('case', 'dtype'), AUTOCAST, ids=[f'{case.name}-{str(dtype)[6:]}' for case, dtype in AUTOCAST]
)
def test_autocast(case, dtype):
    model = case.build(drop_path_rate=0.0).train()
    x = image(ODD)
    with torch.autocast('cpu', dtype):
        outs = model(x)
    sum(out.float().square().mean() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


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
    None, 'mean_distance', 'activation_norm', 'mean_query', 'random', 'uniform_grid', 'learned',
    'local_contrast',
)  # fmt: skip
PRECISIONS = [
    *(('swin-idlevit-map', scorer, torch.bfloat16) for scorer in SCORERS),
    ('vit-idlevit-map', None, torch.float16),
    ('vit-idlevit-map', 'mean_query', torch.float16),
    *((name, None, torch.float16) for name in BY_CASE if name.endswith('evovit')),
    ('vit-evit', None, torch.bfloat16),
]


@pytest.mark.parametrize(('name', 'scorer', 'dtype'), PRECISIONS)
def test_whole_model_in_another_precision(name, scorer, dtype):
    policy = {} if scorer is None else dict(scorer=scorer)
    model = BY_CASE[name].build(policy=policy).to(dtype)
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


@each(
    case
    for case in CASES
    if passing(case) and (case in OWN or case.policy['type'] != 'IdleViT' or 'swin' in case.name)
)
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


# Compilation takes seconds. IdleViT in Swin and MiT: tests/test_backbones/test_running.py
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
    for a, b in zip(compiled_outs, outs, strict=True):
        assert_close(a, b, 1e-5)
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
            for a, b in zip(got, model(image(size)), strict=True):
                assert_close(a, b, 1e-5)
            for a, b in zip(masks[0], model.keep_masks[0], strict=True):
                assert torch.equal(a, b)


@each(['swin-sparsevit', 'pvt-evit', 'vit-evovit', 'vit-idlevit-map-learned'])
def test_copies_after_a_training_forward(case):
    model = case.build().train()
    x = image((1, 3, 45, 58))
    model(x)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.eval()
    for twin in twins:
        with torch.no_grad():
            for a, b in zip(twin.eval()(x), model(x), strict=True):
                assert torch.equal(a, b)
        twin.set_keep_ratios(1.0)
        assert model.keep_ratios == case.ratios()


@torch.no_grad()
@each(['swin-sparsevit', 'pvt-evit', 'pvtv2-idlevit-summary', 'vit-evovit', 'vit-no-cls-evit'])
def test_setting_acts_on_the_next_forward(case):
    model = case.build()
    x = image((2, 3, 45, 58))
    before, masks = model(x), sum(model.keep_masks, [])
    model.set_keep_ratios(case.ratios(0.2))
    few = model(x)
    assert int(model.keep_masks[0][-1].sum()) < int(masks[case.variant.depths[0] - 1].sum())
    model.set_keep_ratios(case.ratios())
    after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[-1], few[-1])


STATEFUL = [
    'swin-sparsevit', 'swin-evit', 'swin-evovit', 'pvtv2-evit', 'pvtv2-evovit', 'vit-evit',
    'vit-evovit', 'vit-evit-norm', 'vit-evovit-norm',
]  # fmt: skip


@torch.no_grad()
@each(STATEFUL)
def test_stages_and_forwards_share_no_memory(case):
    """An image before this one, of whatever size, leaves no trace."""
    model, fresh = case.build(), case.build()
    model(image((2, 3, 61, 33), seed=9))
    for a, b in zip(model(image(ODD)), fresh(image(ODD)), strict=True):
        assert torch.equal(a, b)


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
