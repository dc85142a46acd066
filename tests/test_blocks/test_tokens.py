"""What travels from block to block: rows that stay packed, and what is made of them."""

import itertools

import pytest
import torch
from backbone_zoo import BY_NAME, assert_same_gradients, gradients, image, randomize, weighted_sum
from policy_cases import CORE, SCOPES, Case, each
from torch import nn
from torch.utils import _pytree as pytree

from idlevit_mm import kernels
from idlevit_mm.blocks import Carried, IdleBlock, Tokens, run_blocks
from idlevit_mm.kernels.reference import Reference
from idlevit_mm.ops import Rows
from idlevit_mm.policies import EVERYTHING, Plan

DOUBLE = torch.float64
HW = (9, 11)


class Recording(Reference):
    """The reference, which counts how often rows are moved."""

    name = 'recording'

    def __init__(self):
        self.taken, self.put_back = [], 0

    def take(self, x, rows):
        self.taken.append(rows.ids.shape[1])
        return super().take(x, rows)

    def put(self, x, rows, values):
        self.put_back += 1
        return super().put(x, rows, values)


@pytest.fixture
def recording(monkeypatch):
    backend = Recording()
    monkeypatch.setattr(kernels.backends, 'BACKENDS', [backend])
    return backend


def stage_of(name, policy, depth, **options):
    """Blocks of one stage, and tokens that enter it."""
    variant = BY_NAME[name]
    if variant.is_vit:
        options |= dict(num_layers=depth)
    elif variant.is_swin:
        options |= dict(depths=(depth, 1))
    else:
        options |= dict(num_layers=[depth, *variant.kwargs['num_layers'][1:]])
    model = randomize(variant.build(policy=policy, drop_path_rate=0.0, **options)).double().eval()
    blocks = model.idle_blocks[0]
    generator = torch.Generator().manual_seed(5)
    shape = 2, HW[0] * HW[1] + blocks[0].num_class, blocks[0].policy.scorer.embed_dims
    return blocks, torch.randn(shape, generator=generator, dtype=DOUBLE)


# --- what is held ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize('fuse', [True, False])
def test_evit_by_class_attention_gathers_once_per_reorganisation(recording, fuse):
    blocks, x = stage_of('vit', dict(type='EViT', fuse=fuse), 9)
    ratios = [1.0, 1.0, 0.7, 1.0, 1.0, 0.7, 1.0, 1.0, 1.0]
    run_blocks(blocks, x, HW, ratios)
    first = 1 + 70  # ceil(0.7 * 99), and the class token, which is gathered with them
    second = 1 + (50 if fuse else 49)  # of 71 in play with the fused one
    assert recording.taken == [first, second]
    # Who leaves is put back, and all at the end.
    assert recording.put_back == 2


@torch.no_grad()
@pytest.mark.parametrize('name', ['swin', 'vit-no-cls', 'vit'])
def test_dropping_gathers_once_per_choice(recording, name):
    policy = dict(type='EViT', fuse=False, scorer='activation_norm')
    blocks, x = stage_of(name, policy, 6)
    run_blocks(blocks, x, HW, [1.0, 0.7, 1.0, 1.0, 0.5, 1.0])
    wide, narrow = (count + blocks[0].num_class for count in (70, 35))
    assert recording.taken == [wide, narrow]
    assert recording.put_back == 2


@torch.no_grad()
def test_pvt_puts_rows_back_for_its_keys_alone(recording):
    """Keys are those of the whole map, so the map is settled in each block; rows stay packed."""
    blocks, x = stage_of('pvt', dict(type='EViT', fuse=False), 4)
    run_blocks(blocks, x, HW, [0.7, 1.0, 1.0, 0.5])
    # Queries are taken from the normalised map in each block, and rows twice.
    assert recording.taken == [70, 70, 70, 70, 35, 35]


@torch.no_grad()
@pytest.mark.parametrize('policy', ['IdleViT', 'EvoViT', dict(type='EViT', fuse=True)])
def test_rows_with_other_choices_or_summaries_are_not_held(recording, policy):
    policy = dict(type=policy) if isinstance(policy, str) else policy
    blocks, x = stage_of('vit-no-cls', dict(policy, scorer='activation_norm'), 3)
    for block, ratio in zip(blocks, (0.7, 0.7, 0.5), strict=True):
        x, carried = block(x, HW, ratio)
        assert carried.pack is None
    assert len(recording.taken) == 3


@torch.no_grad()
def test_a_pack_serves_no_other_plan():
    blocks, x = stage_of('swin', None, 1)
    first, second = (Plan(Rows(torch.tensor([ids] * 2)), hold=True) for ids in ([1, 5], [2, 5]))
    weights = torch.ones(2, HW[0] * HW[1], dtype=DOUBLE)
    tokens = blocks[0].opened(Tokens(x, HW), first)
    assert blocks[0].opened(tokens, first).pack is tokens.pack
    assert torch.equal(blocks[0].opened(tokens, second).now, x[:, [2, 5]])
    assert blocks[0].opened(tokens, first.but(summary=weights)).now.shape[1] > 2
    assert torch.equal(blocks[0].opened(tokens, EVERYTHING).now, x)


def settling(blocks, x, ratios):
    """The stage with rows put back after each block."""
    carried = Carried()
    for block, ratio in zip(blocks, ratios, strict=True):
        x, carried = block(x, HW, ratio, carried)
        x = block.settled(Tokens(x, HW, carried.pack))
        carried = Carried(None, carried.plan, carried.state)
    return x


HELD = [
    ('vit', dict(type='EViT')),
    ('vit', dict(type='EViT', fuse=False)),
    ('vit', dict(type='EViT', fuse=False, scorer='activation_norm')),
    ('swin', dict(type='EViT', fuse=False)),
    ('pvt', dict(type='EViT', fuse=False)),
    ('pvtv2', dict(type='EViT', fuse=False)),
]


@pytest.mark.parametrize(('name', 'policy'), HELD)
def test_held_rows_are_those_that_would_be_gathered(name, policy):
    """Bit for bit, and the gradients are the same."""
    blocks, x = stage_of(name, policy, 5)
    ratios = [1.0, 0.7, 1.0, 0.6, 1.0]
    results = []
    for held in (True, False):
        x = x.detach().requires_grad_()
        whole = nn.ModuleList(blocks)
        whole.zero_grad()
        out = run_blocks(blocks, x, HW, ratios)[0][0] if held else settling(blocks, x, ratios)
        weighted_sum([out]).backward()
        grads = {name: p.grad for name, p in whole.named_parameters()}
        results.append((out.detach(), {**grads, 'x': x.grad}))
    (out, grads), (want, want_grads) = results
    assert torch.equal(out, want)
    assert_same_gradients(grads, want_grads, 1e-12)
    assert_looking_at_the_map_changes_nothing(blocks, x, ratios)


@torch.no_grad()
def assert_looking_at_the_map_changes_nothing(blocks, x, ratios):
    """Outputs in the middle of a stage, and recorded inputs, are of the whole map."""
    (want,), _ = run_blocks(blocks, x, HW, ratios)
    taps = {index: lambda tokens: tokens for index in range(len(blocks))}
    outs, record = run_blocks(blocks, x, HW, ratios, True, taps)
    assert torch.equal(outs[-1], want)
    assert len(record.inputs) == len(blocks)
    for out, entering in zip(outs, record.inputs[1:], strict=False):
        assert torch.equal(out, entering)
    for count in range(1, len(blocks)):
        (alone,), _ = run_blocks(blocks[:count], x, HW, ratios[:count])
        assert torch.equal(outs[count - 1], alone)


# Every way in which rows are out of their places between two blocks.
WAYS = (
    'swin-idlevit-windows', 'swin-evit-dropping', 'swin-evovit', 'pvtv2-evovit', 'vit-evit',
    'vit-evit-dropping', 'vit-evovit',
)  # fmt: skip


@torch.no_grad()
@each(WAYS)
def test_settled_changes_nothing(case):
    """It copies: what is packed stays so, and asking twice gives the same."""
    model = case.build().double()
    for blocks, ratios in zip(model.idle_blocks, case.ratios(), strict=True):
        channels = blocks[0].policy.scorer.embed_dims
        x = torch.randn(2, HW[0] * HW[1] + blocks[0].num_class, channels, dtype=DOUBLE)
        carried = Carried()
        for block, ratio in zip(blocks, ratios, strict=True):
            x, carried = block(x, HW, ratio, carried)
            tensors = [leaf for leaf in pytree.tree_leaves((x, carried)) if torch.is_tensor(leaf)]
            before = [tensor.clone() for tensor in tensors]
            tokens = Tokens(x, HW, carried.pack)
            first = block.settled(tokens)
            assert torch.equal(first, block.settled(tokens))
            assert torch.equal(first, block.settled(Tokens(first, HW)))
            assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# --- recomputation ---------------------------------------------------------------------------


@each(
    [*SCOPES, *(case for case in CORE if case.policy['type'] != 'IdleViT' or case.variant.is_vit)]
)
def test_recomputation_chooses_no_other_tokens(case):
    """Where scores and what is dropped are drawn, and for every policy; new draws would differ."""
    # In a plain ViT the keys that scores were computed with stand outside of what is recomputed.
    policy = {} if case.variant.has_class_token else dict(scorer='random')
    results, drawn, calls = [], [], ([], [])
    for with_cp in (False, True):
        dropping = dict(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2)
        model = case.build(policy=policy, with_cp=with_cp, **dropping).double().train()
        for block in itertools.chain(*model.idle_blocks):
            block.ffn.register_forward_pre_hook(lambda *_, to=calls[with_cp]: to.append(1))
        torch.manual_seed(11)
        outs, grads = gradients(model, image((2, 3, 45, 58), dtype=DOUBLE))
        drawn.append(torch.rand(()))
        results.append((outs, grads, sum(model.keep_masks, [])))
    (outs, grads, masks), (cp_outs, cp_grads, cp_masks) = results
    assert all(torch.equal(a, b) for a, b in zip(masks, cp_masks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outs, cp_outs, strict=True))
    assert_same_gradients(cp_grads, grads, 1e-12)
    assert drawn[0] == drawn[1], 'the backward pass has drawn scores'
    assert len(calls[1]) == 2 * len(calls[0]) > 0, 'nothing was recomputed'


# --- blocks as modules among others ----------------------------------------------------------


@torch.no_grad()
@each([*WAYS, 'pvt-idlevit-map'])
def test_a_block_returns_a_tuple_whose_first_is_a_tensor(case):
    """Hooks of wrappers and debuggers see it; where all are computed it is the true map."""
    model, seen = case.build(), []
    for block in itertools.chain(*model.idle_blocks):
        block.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    model(image((2, 3, 45, 58)))
    assert len(seen) == sum(case.variant.depths)
    for _, output in seen:
        assert type(output) is tuple
        x, carried = output
        assert torch.is_tensor(x)
        assert x.shape[0] == 2
        assert isinstance(carried, Carried)
    model.set_keep_ratios(1.0)
    del seen[:]
    model(image((2, 3, 45, 58)))
    for args, (x, carried) in seen:
        assert carried.pack is None
        assert carried.plan.rows is None
        assert x.shape == args[0].shape
    for (_, (x, _)), (args, _) in itertools.pairwise(seen):
        if x.shape == args[0].shape:
            assert x is args[0]


def remake(tree):
    """New tuples of the same tensors, as wrappers of modules make them."""
    made = pytree.tree_map(lambda leaf: leaf, tree)
    assert isinstance(made, type(tree))
    return made


@each([*WAYS, 'swin-sparsevit', 'pvtv2-evit', 'swin-idlevit-map-learned'])
def test_tuples_may_be_made_anew_between_blocks(case):
    results = []
    for wrapped in (False, True):
        model = case.build(drop_path_rate=0.0).double().train()
        if wrapped:
            for block in itertools.chain(*model.idle_blocks):
                block.register_forward_pre_hook(lambda module, args: remake(args))
                block.register_forward_hook(lambda module, args, output: remake(output))
        results.append(gradients(model, image((2, 3, 45, 58), dtype=DOUBLE)))
    (outs, grads), (wrapped_outs, wrapped_grads) = results
    assert all(torch.equal(a, b) for a, b in zip(outs, wrapped_outs, strict=True))
    assert_same_gradients(wrapped_grads, grads, 1e-14)


def test_held_rows_stay_so_in_tuples_made_anew(recording):
    blocks, x = stage_of('vit', dict(type='EViT'), 5)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: remake(args))
        block.register_forward_hook(lambda module, args, output: remake(output))
    run_blocks(blocks, x, HW, [1.0, 0.7, 1.0, 1.0, 1.0])
    assert len(recording.taken) == 1


class Unread(nn.Module):
    """In the place of a policy that must not be read any more."""

    def __getattr__(self, name):
        raise AssertionError(f'policy.{name} was read after planning')


@torch.no_grad()
@each([*WAYS, 'swin-sparsevit', 'pvtv2-evit', 'vit-idlevit-map'])
def test_policies_are_not_read_while_a_family_computes(case):
    """Both halves run with plan and tokens alone."""
    model = case.build().double()
    block = model.idle_blocks[0][-1]
    assert isinstance(block, IdleBlock)
    channels = block.policy.scorer.embed_dims
    x = torch.randn(2, HW[0] * HW[1] + block.num_class, channels, dtype=DOUBLE)
    state = block(x, HW, 1.0)[1].state
    carried = Carried(None, EVERYTHING, state)
    tokens, scores, keys = block.look(Tokens(x, HW), 0.6, carried)
    plan, state = block.planned(tokens, scores, 0.6, carried)
    policy, block.policy = block.policy, Unread()
    tokens, attention = block.attention_half(tokens, plan, keys)
    block.policy = policy
    assert (attention is not None) == plan.ask
    if plan.ask:
        regroup, _ = policy.between(attention, plan, 0.6, state)
        tokens, plan = block.regrouped(tokens, plan, regroup)
    block.policy = Unread()
    tokens = block.mlp_half(tokens, plan)
    settled = block.settled(tokens)
    block.policy = policy
    carried = Carried(None, EVERYTHING, block(x, HW, 1.0)[1].state)
    out, carried = block(x, HW, 0.6, carried)
    assert torch.equal(settled, block.settled(Tokens(out, HW, carried.pack)))
    assert plan.rows is not None
    assert isinstance(plan.rows, Rows)
    assert isinstance(case, Case)
