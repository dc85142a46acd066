"""What Swin V2 has of its own: its arguments, windows, norms, scores and shares of attention."""

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    assert_all_close,
    assert_close,
    assert_same_gradients,
    gradients,
    image,
    load_twin,
    randomize,
)
from mmengine.registry import MODELS

from idlevit_mm.analysis.models import host_backbone
from idlevit_mm.errors import SettingError
from idlevit_mm.kernels import use_backend
from idlevit_mm.layers import ShiftCosineMSA

VARIANT = BY_NAME['swinv2']


def pair(**options):
    """Ours and mmpretrain's, of the same random weights, in double precision."""
    model = randomize(VARIANT.build(**options)).double()
    twin = load_twin(VARIANT.build_twin(**options).double(), model.state_dict())
    return model.eval(), twin


def assert_equal(model, twin, x, tol=1e-10):
    outs, grads = gradients(model, x)
    wants, want_grads = gradients(twin, x)
    assert_all_close(outs, wants, tol)
    assert_same_gradients(grads, want_grads, tol)


@pytest.mark.parametrize(
    ('options', 'size'),
    [
        # As learned in other windows, in others of each stage.
        (dict(window_size=[5, 3], pretrained_window_sizes=[0, 9]), (45, 58)),
        # One window is not shifted, more are.
        (dict(pad_small_map=False), (32, 32)),
        (dict(pad_small_map=False), (45, 58)),
        # Its table is resized in single precision, and here not at all.
        (dict(use_abs_pos_embed=True, img_size=(37, 50)), (37, 50)),
        (dict(frozen_stages=0), (37, 50)),
        (dict(norm_cfg=None, frozen_stages=1, out_indices=(1,)), (37, 50)),
    ],
    ids=str,
)
def test_arguments_mean_the_same_as_in_mmpretrain(options, size):
    model, twin = pair(drop_path_rate=0.0, **options)
    model.train(), twin.train()
    trains = {name: p.requires_grad for name, p in twin.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    x = image((2, 3, *size), dtype=torch.float64)
    if all(trains[name] for name in trains if name.startswith('stages.1')):
        assert_equal(model, twin, x)
    else:
        assert_close(model(x)[0], twin(x)[0], 1e-10)


def test_a_dropped_branch_is_normalised_as_in_mmpretrain():
    """What stochastic depth takes away leaves the bias of the norm behind it."""
    model, twin = pair(drop_path_rate=0.5, drop_rate=0.2)
    outs = []
    for one in (model, twin):
        one.train()
        torch.manual_seed(4)
        outs.append(one(image((4, 3, 37, 50), dtype=torch.float64)))
    assert_all_close(*outs, 1e-10)


def test_its_logits_are_capped():
    model, twin = pair()
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            if name.endswith('logit_scale'):
                parameter.data.fill_(4.7)  # above the logarithm of 100
    assert_equal(model, twin, image((1, 3, 33, 47), dtype=torch.float64))


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(arch='tinier'), "arch='tinier' is unknown; allowed: tiny, .*embed_dims"),
        (dict(arch=dict(depths=[1])), r"arch=\{'depths': \[1\]\} is unknown"),
        (dict(window_size=[4, 4]), r'window_size=\[4, 4\] .* one entry for each of 4 stages'),
        (dict(pretrained_window_sizes=[4]), r'pretrained_window_sizes=\[4\] must have one'),
        (dict(pretrained_window_sizes=[4, 4, 4, -1]), 'pretrained_window_sizes=.*-1.*from 0 on'),
    ],
)
def test_what_cannot_be_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        MODELS.build(dict(type='IdleSwinTransformerV2', **options))
    with pytest.raises(ValueError, match='depths=.*; allowed: whole numbers from 1 on'):
        VARIANT.build(depths=(0, 1))


def test_names_of_architectures_and_defaults():
    model = MODELS.build(dict(type='IdleSwinTransformerV2', arch='T'))
    assert (model.depths, model.num_features) == ((2, 2, 6, 2), [96, 192, 384, 768])
    dense = host_backbone(model, {})
    assert all(block.attn.pad_small_map for stage in dense.stages for block in stage.blocks)
    small = VARIANT.build(pad_small_map=False)
    with pytest.raises(SettingError, match='pad_small_map=False with a map of 3x9 tokens'):
        small(image((1, 3, 12, 36)))


def test_weights_of_another_window_fit(tmp_path):
    state = randomize(VARIANT.build(), 5).state_dict()
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in state.items()}), tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    model = VARIANT.build(window_size=6, pretrained_window_sizes=(4, 4), init_cfg=init_cfg)
    wanted = {k: v.clone() for k, v in VARIANT.build(window_size=6).state_dict().items()}
    model.init_weights()
    model.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        kept = name.endswith('relative_coords_table') or torch.equal(
            value, (wanted if name.endswith('index') else state)[name]
        )
        assert kept, name
    # Steps of a window are where they were in the one that the biases were learned in.
    inner = model.stages[0].blocks[0].attn.w_msa.relative_coords_table[:, 2:-2, 2:-2]
    assert_close(inner, state['stages.0.blocks.0.attn.w_msa.relative_coords_table'], 1e-6)


@pytest.mark.parametrize('shift', [0, 2])
def test_scores_and_shares_are_by_cosines(shift):
    """Against the attention of all pairs; the share is that of the head mean of logits."""
    attn = randomize(ShiftCosineMSA(8, 2, 4, shift_size=shift)).double()
    x, mask = torch.randn(2, 64, 8, dtype=torch.float64), torch.rand(2, 64) < 0.4
    core = attn.w_msa
    bias = torch.cat([core.q_bias, torch.zeros(8), core.v_bias])
    query, key, _ = torch.nn.functional.linear(x, core.qkv.weight, bias).chunk(3, dim=-1)
    scale = core.logit_scale.exp()

    def logits(query, key):
        pairs = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (query, key))
        query, key = (t / t.norm(dim=-1, keepdim=True) for t in pairs)
        return query @ key.transpose(-1, -2) * scale

    mean = torch.nn.functional.linear(x.mean(dim=1, keepdim=True), core.qkv.weight[:8], bias[:8])
    want = logits(mean, key).softmax(dim=-1).squeeze(2)
    assert_close(core.mean_query_attention(x, (8, 8)), want, 1e-12)

    rows, cols = torch.arange(64) // 8, torch.arange(64) % 8
    # Places in the shifted map, and the part of the window that one may look at.
    sides = [(side - shift) % 8 for side in (rows, cols)]
    near = [(s // 4)[:, None] == s // 4 for s in sides]
    near += [((s >= 8 - shift)[:, None] == (s >= 8 - shift)) for s in sides]
    steps = [(s[:, None] - s).clamp(-3, 3) + 3 for s in sides]
    table = core.bias_table().unflatten(0, (7, 7))
    weights = logits(query, key).mean(dim=1) + table[steps[0], steps[1]].mean(dim=-1)
    hidden = ~torch.stack(near[:2]).all(dim=0)
    weights = weights - 100 * ~torch.stack(near[2:]).all(dim=0)
    weights = weights.masked_fill(hidden, float('-inf')).softmax(dim=-1)
    share = attn.kept_share(x, (8, 8), mask.double())
    assert_close(share, (weights * mask[:, None]).sum(dim=-1), 1e-12)


def test_logits_across_the_border_are_lowered_not_hidden(monkeypatch):
    """By 100, as in mmpretrain: at the highest scale, tokens that are opposites see one another."""
    attn = randomize(ShiftCosineMSA(32, 2, 4, shift_size=2))
    core, x = attn.w_msa, torch.randn(1, 1, 32) * torch.ones(1, 64, 1)
    x[:, :16] *= -1  # the first two rows, which share windows with the last two
    with torch.no_grad():
        core.qkv.weight[32:64] = -core.qkv.weight[:32]
        core.q_bias.zero_()
        core.logit_scale.fill_(5.0)
        outs = {}
        for name in ('cpu', 'reference'):
            with use_backend(name):
                outs[name] = attn(x, (8, 8), None)
        assert_close(outs['cpu'], outs['reference'], 1e-5)
        monkeypatch.setattr(core, 'apart', None)
        assert (attn(x, (8, 8), None) - outs['cpu']).abs().max() > 0.1
