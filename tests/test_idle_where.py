"""Blocks idle where it pays: predicted from what they do, the same for whoever knows the pace."""

import copy

import pytest
import torch
from backbone_zoo import BY_NAME, VARIANTS, all_equal, image, randomize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from idlevit_mm.analysis.cost import predicted_speedups, stage_seconds
from idlevit_mm.blocks import Work, cost, idle_work, seconds
from idlevit_mm.checkpoints import compare
from idlevit_mm.kernels import PACES, Pace, pace_of, use_backend

FAMILIES = ('swin', 'pvt', 'pvtv2', 'mit', 'svt', 'vit', 'vit-no-cls', 'vitdet')
# Where choosing is free idling always pays, where it takes a second never.
FREE = Pace(10**9, 10**9, 10**9, 10**9, 0, 0)
DEAR = FREE._replace(choice=10**9)


def build(name, pace=None, **kwargs):
    model = randomize(BY_NAME[name].build(keep_ratios=0.5, idle_where='pays', **kwargs)).eval()
    if pace is not None:
        model.payer.rates.copy_(torch.tensor(pace))
    return model


def run(model, size=(2, 3, 40, 64)):
    with torch.no_grad():
        return model(image(size))


def shares(model):
    return [mask.float().mean().item() for stage in model.keep_masks for mask in stage]


@pytest.mark.parametrize('name', FAMILIES)
def test_blocks_run_dense_where_idling_does_not_pay(name):
    model = build(name, DEAR)
    outs = run(model)
    assert set(shares(model)) == {1.0}
    dense = BY_NAME[name].build(keep_ratios=1.0).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    for out, want in zip(outs, run(dense), strict=True):
        assert all_equal(flat(out), flat(want))
    model = build(name, FREE)
    run(model)
    assert min(shares(model)) < 1.0


def flat(out):
    return out if isinstance(out, list) else [out]


def test_small_images_do_not_pay_and_large_ones_do():
    model = build('swin-w7', embed_dims=32)
    run(model, (1, 3, 32, 32))
    assert set(shares(model)) == {1.0}
    run(model, (1, 3, 640, 960))
    assert min(shares(model)) < 1.0
    assert {ratio for stage in model.keep_ratios for ratio in stage} == {0.5}


@pytest.mark.parametrize('name', ['swin', 'pvtv2', 'vit'])
def test_a_checkpoint_repeats_decisions(name):
    model, again = build(name, DEAR), build(name)
    run(again)  # with the pace of this machine
    again.half().float().load_state_dict(model.half().state_dict())
    run(again)
    assert set(shares(again)) == {1.0}
    assert again.payer.rates.tolist() == list(DEAR)


def test_the_pace_of_the_first_pass_is_kept(monkeypatch):
    model = build('pvt')
    run(model)
    assert model.payer.rates.tolist() == list(pace_of(torch.device('cpu')))
    twin = copy.deepcopy(model)
    assert all(block.payer is twin.payer for stage in twin.idle_blocks for block in stage)
    monkeypatch.setitem(PACES, 'cpu', DEAR)
    run(twin)
    assert twin.payer.rates.tolist() == model.payer.rates.tolist()


def test_checkpoints_load_strictly_with_and_without_a_pace():
    dense, model = BY_NAME['pvt'].build(), build('pvt', DEAR)
    assert not any('payer' in key for key in dense.state_dict())
    for one, other in ((model, dense), (dense, model)):
        given = {f'backbone.{key}': value for key, value in other.state_dict().items()}
        whole = torch.nn.ModuleDict(dict(backbone=one))
        assert compare(whole.state_dict(), given).misfit() == ''
        whole.load_state_dict(given, strict=True)
    assert model.payer.rates.tolist() == list(DEAR)
    older = dict(model.state_dict(), **{'payer.rates': torch.ones(3, dtype=torch.int64)})
    assert compare(model.state_dict(), older).misfit() == ''
    model.load_state_dict(older, strict=True)
    assert model.payer.rates.tolist() == list(DEAR)


def test_what_runs_dense_is_logged_once(monkeypatch):
    lines, model = [], build('swin', DEAR)
    monkeypatch.setattr(cost, 'print_log', lambda line, *_: lines.append(line))
    run(model)
    run(model)
    assert len(lines) == 2  # one for each stage
    assert '8 channels on 10x16 tokens (batch 2) run dense' in lines[0]


@pytest.mark.parametrize('value', ['sometimes', True, None])
def test_an_unknown_idle_where_is_refused(value):
    with pytest.raises(ValueError, match=r'idle_where=.* is unknown; allowed: always, pays'):
        BY_NAME['pvt'].build(idle_where=value)


@pytest.mark.parametrize('pace', [DEAR, FREE])
def test_compiled_and_exported(pace):
    model = build('pvtv2', pace)
    wants = run(model)
    pixels = image((2, 3, 40, 64))
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend='eager')(pixels)
        exported = torch.export.export(model, (pixels,)).module()(pixels)
    for out, again, want in zip(compiled, exported, wants, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)


def test_work_is_what_pytorch_counts(subtests):
    """At keep ratio 1.0, on a map that windows and cells divide."""
    for variant in VARIANTS:
        with subtests.test(variant.name):
            assert_work_is_counted(variant)


def assert_work_is_counted(variant):
    model = variant.build().eval()
    side = 24 if variant.is_twins else 4 * variant.kwargs.get('window_size', 7)
    for block in (stage[place] for stage in model.idle_blocks for place in {0, len(stage) - 1}):
        if side % (getattr(block.attn, 'window_size', 1) or 1):
            continue
        x = torch.randn(1, side**2 + block.num_class, block.embed_dims)
        counter = FlopCounterMode(display=False)
        # PyTorch has no formula for its fused attention on the CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), use_backend('reference'), counter:
            block(x, (side, side))
        work = idle_work(block, 1, (side, side), 1.0)
        assert work.products + work.pairs == pytest.approx(counter.get_total_flops() / 2, rel=0.06)


def test_work_falls_with_the_keep_ratio():
    for name in FAMILIES:
        block = BY_NAME[name].build().idle_blocks[0][0]
        works = [idle_work(block, 2, (40, 64), ratio) for ratio in (1.0, 0.7, 0.3)]
        assert works[0].products > works[1].products > works[2].products
        assert works[0].choices == 0
        assert works[1].choices == 1


def test_predictions_add_up():
    pace, work = Pace(2, 4, 8, 16, 10**9, 3 * 10**9), Work(4, 8, 8, 2, 1)
    assert seconds(work, pace, torch.float32) == 2 + 1 + 2 + 2 + 3
    assert seconds(work, pace, torch.bfloat16) == 1 + 1 + 1 + 2 + 3
    model = build('swin', DEAR)
    run(model)
    ran = stage_seconds(model, FREE, torch.float32)
    assert ran == stage_seconds(model, FREE, torch.float32, 1.0)
    assert sum(stage_seconds(model, FREE, torch.float32, 0.5)) < sum(ran)
    table = predicted_speedups(model, ['A100', 'H100'], (0.7, 0.5), torch.bfloat16)
    assert table.shape == (2, 2)
    assert (table > 0).all().all()
