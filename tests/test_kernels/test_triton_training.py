"""Training on the kernels of GPUs, in Triton's interpreter, which ``test_triton`` starts.

Gradients are compared with those of the reference in float64; and a choice by many programs with
that by one.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from backbone_zoo import assert_close, image, randomize
from mmengine.registry import MODELS
from test_triton import FAMILIES, INSIDE, SIZE, SWIN, inside

from idlevit_mm.kernels import Reference, Triton, WindowCore, backend_at, use
from idlevit_mm.ops import Rows

if INSIDE:
    from idlevit_mm.kernels.triton import ops, training

pytestmark = inside

# Of Swin one stage.
STAGE = dict(num_heads=(1,), strides=(4,), out_indices=(0,))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(scores, keep, *layout):
    count = max(1, int(keep * scores.shape[1]))
    ids, offsets, places = ops.select(scores, count, *layout, None)
    return Rows(ids, None, False, offsets, places)


def assert_near(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(
    ('hw_shape', 'window', 'shift', 'keep', 'batch', 'heads', 'dtype', 'hides'),
    [
        ((9, 6), 5, 0, 0.5, 1, 2, torch.float32, False),
        ((9, 6), 5, 2, 0.3, 3, 1, torch.float32, False),
        ((9, 6), 5, 2, 0.5, 1, 2, torch.float16, False),
        ((8, 9), 7, 3, 0.5, 1, 2, torch.float32, False),
        ((13, 6), 7, 0, 0.3, 1, 1, torch.float32, False),
        ((6, 7), 5, 2, 1.0, 1, 1, torch.float32, False),
        ((6, 7), 5, 0, 1.0, 1, 1, torch.float32, True),
    ],
)
def test_attention_in_windows_and_its_gradients(
    hw_shape, window, shift, keep, batch, heads, dtype, hides
):
    # Many windows of the second image have no active token.
    scores = normal(batch, hw_shape[0] * hw_shape[1])
    scores[1:2] = torch.arange(scores.shape[1])
    rows = None if keep == 1 else chosen(scores, keep, hw_shape, window, shift)
    count = scores.shape[1] if rows is None else rows.ids.shape[1]
    shapes = (batch, count, 48 * heads), (48 * heads,), (heads, window**2, window**2)
    weight = normal(batch, count, 16 * heads, seed=9)

    def passed(backend, precision):
        tensors = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        qkv, blank, bias = (part.to(precision).requires_grad_() for part in tensors)
        core = WindowCore(bias[None], blank, window, heads, 0.7, hides_padding=hides)
        out = backend.attend_windows(qkv, core, hw_shape, shift, rows)
        loss = (out * weight.to(precision)).sum() + 0.0 * blank.sum()
        return out, *torch.autograd.grad(loss, (qkv, blank, bias))

    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert_near(passed(Triton(), dtype), passed(Reference(), torch.float64), tolerance)


@pytest.mark.parametrize('keep', [0.2, 1.0])
def test_moves_of_rows_and_their_gradients(keep):
    x, weight = normal(2, 54, 5), normal(2, 54, 5, seed=1)
    x[0] = -0.0
    rows = chosen(normal(2, 54, seed=2), keep, (9, 6), 4, 2)

    def passed(backend):
        whole, map_of_ones = x.clone().requires_grad_(), torch.ones_like(x).requires_grad_()
        taken = backend.take(whole, rows)
        joined = backend.put(map_of_ones * whole, rows, taken.square() - 3 * taken)
        # Its gradient is no contiguous tensor.
        loss = (joined.mT * weight.mT).sum()
        return taken, joined, *torch.autograd.grad(loss, (whole, map_of_ones))

    for one, other in zip(passed(Triton()), passed(Reference()), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def trained(model, x, backend, autocast):
    """Outputs, chosen tokens, and gradients of all parameters."""
    model.zero_grad()
    with use(backend):
        with torch.autocast('cpu', torch.float16) if autocast else nullcontext():
            assert backend_at(x).name == backend
            outs = model(x)
            masks = [mask for stage in model.keep_masks for mask in stage]
        sum((out * normal(*out.shape)).sum() for out in outs).backward()
    grads = [part.grad for part in model.parameters()]
    return outs, masks, [torch.zeros(1) if grad is None else grad for grad in grads]


@pytest.mark.parametrize(
    ('family', 'depth', 'with_cp', 'autocast'),
    # Under autocast tokens of later blocks may be others, by rounding.
    [('swin', 2, False, False), ('swin', 1, True, True), ('pvt', 2, True, False)],
)
def test_training_of_families(family, depth, with_cp, autocast, monkeypatch):
    config = dict(FAMILIES[family], keep_ratios=0.5, with_cp=with_cp, drop_path_rate=0.0)
    if family == 'swin':
        config |= dict(STAGE, depths=(depth,))
    model, x = randomize(MODELS.build(config)).train(), image(SIZE)
    attended, attend = [], training.attend_packed_windows
    monkeypatch.setattr(
        training, 'attend_packed_windows', lambda *args: attended.append(args) or attend(*args)
    )
    outs, masks, grads = trained(model, x, 'triton', autocast)
    # Twice where it is recomputed.
    assert len(attended) == (depth * (1 + with_cp) if family == 'swin' else 0)
    assert all(args[0].dtype == (torch.float16 if autocast else x.dtype) for args in attended)
    wants, others, want_grads = trained(model, x, 'reference', False)
    assert all(map(torch.equal, masks, others))
    tolerance = 2e-2 if autocast else 1e-4
    most = max(grad.norm() for grad in want_grads)
    for out, want in zip(outs, wants, strict=True):
        assert_close(out.float(), want, tolerance)
    for grad, want in zip(grads, want_grads, strict=True):
        assert (grad - want).norm() <= tolerance * max(want.norm(), 0.01 * most)


def test_a_compiled_step_of_training():
    torch._dynamo.reset()
    config = dict(SWIN | STAGE, depths=(1,), keep_ratios=0.5, drop_path_rate=0.0)
    model, x = randomize(MODELS.build(config)).train(), image((1, *SIZE[1:]))
    outs, _, grads = trained(model, x, 'triton', False)
    model.compile(backend='aot_eager', fullgraph=True)
    others, _, other_grads = trained(model, x, 'triton', False)
    assert_close(others[0], outs[0], 1e-6)
    assert_near(other_grads, grads, 1e-5)


def test_what_a_step_moves_is_counted(monkeypatch, capsys):
    monkeypatch.syspath_prepend('tools/analysis_tools')
    import count_traffic

    options = ['--keep-ratios', '0.5', '--batch', '1', '--shape', '400x672']
    for model, mode, columns in (('pvt-t', 'inference', (4, 6)), ('swin-t', 'training', (4, 5, 6))):
        assert count_traffic.main([model, *options, '--mode', mode]) == 0
        lines = [line.split('|') for line in capsys.readouterr().out.splitlines()[2:]]
        reference, triton = ([float(line[column]) for column in columns] for line in lines)
        assert all(one < 0.7 * other for one, other in zip(triton, reference, strict=True))


MIXED = 0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 1e-40


@pytest.mark.parametrize(
    ('values', 'count'), [(None, 27), ((0.0, 1.0), 20), (MIXED, 45), ((0.0,), 1)]
)
def test_many_programs_choose_as_one_does(values, count, monkeypatch):
    scores = normal(2, 54)
    if values is not None:
        scores = torch.tensor(values)[normal(2, 54).mul(99).long() % len(values)]
    wants = ops.select(scores, count, (9, 6), 4, 2, None)
    # Windows of 4 on 9 x 6 tokens have 96 slots, in three blocks.
    monkeypatch.setattr(ops.selection, 'select_kernel', None)
    monkeypatch.setattr(ops, '_MANY', 54)
    monkeypatch.setattr(ops, '_SCORES', 128)
    monkeypatch.setattr(ops, '_SLOTS', 32)
    gots = ops.select(scores, count, (9, 6), 4, 2, None)
    assert all(map(torch.equal, gots, wants))
