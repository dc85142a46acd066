"""Attention within squeezed windows equals plain softmax, window by window."""

import pytest
import torch
from hypothesis import example, given, settings
from window_cases import Problem, full_and_idle_windows, problem, problems

from idlevit_mm.kernels import WindowCore
from idlevit_mm.kernels.cpu import windows
from idlevit_mm.kernels.cpu.windows import attend_squeezed

HEADS, CHANNELS = 2, 6
quick = settings(deadline=None, max_examples=40, derandomize=True)


def tensors(case, seed=0, dtype=torch.float64):
    """Random qkv of all packed rows, that of padding, and a bias of all slot pairs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (case.batch * case.rows, 3 * CHANNELS),
        (3 * CHANNELS,),
        (HEADS, case.slots, case.slots),
    )
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def attend(case, qkv, blank, bias, scale=0.7):
    core = WindowCore(bias[None], blank, case.window, HEADS, scale)
    return attend_squeezed(qkv[None], core, case.pack())[0]


def naive(case, qkv, blank, bias, scale=0.7):
    """Window by window and head by head, without any packing: (R, C)."""
    out = qkv.new_zeros(len(qkv), CHANNELS)
    rows = torch.cat([qkv, blank[None]])
    for (image, window), occupied in case.occupied().items():
        numbers = [case.row(image, window, slot) for slot in occupied]
        there = torch.tensor([number is not None for number in numbers])
        numbers = torch.tensor([len(qkv) if number is None else number for number in numbers])
        slots = torch.tensor(occupied)
        regions = torch.tensor([case.region(window, slot) for slot in occupied])
        in_window = slots < case.slots
        both = in_window[:, None] & in_window[None, :]
        slots = slots.clamp(max=case.slots - 1)
        apart = (regions[:, None] != regions[None, :]) & (regions[:, None] >= 0)
        apart &= regions[None, :] >= 0
        heads = rows[numbers].view(len(numbers), 3, HEADS, -1)
        parts = []
        for head in range(HEADS):
            query, key, value = heads[:, :, head].unbind(1)
            pairs = bias[head][slots[:, None], slots[None, :]]
            logits = scale * query @ key.t() + torch.where(both, pairs, 0.0)
            parts.append(logits.masked_fill(apart, float('-inf')).softmax(-1) @ value)
        out = out.index_copy(0, numbers[there], torch.cat(parts, dim=1)[there])
    return out


def assert_equals_naive(case, tol=1e-12, dtype=torch.float64):
    args = tensors(case, dtype=dtype)
    got, want = attend(case, *args), naive(case, *args)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)
    weight = torch.randn(got.shape, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad((got * weight).sum(), args)
    wants = torch.autograd.grad((want * weight).sum(), args)
    for name, a, b in zip(('qkv', 'blank', 'bias'), grads, wants, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, msg=lambda m, n=name: f'{n}: {m}')


@given(problems(most=11, windows=(1, 4)))
@example(problem(1, 13, 7, 3, count=5, batch=2))
@example(problem(13, 11, 7, 3, count=90, batch=2))
@example(problem(13, 11, 7, 3, count=30, batch=2, summarised=True))
@example(problem(5, 9, 4, 2, batch=3, summarised=True))
@quick
def test_outputs_and_gradients_equal_plain_softmax(case: Problem):
    assert_equals_naive(case)


@pytest.mark.parametrize('summarised', [False, True])
def test_single_precision(summarised):
    case = problem(13, 11, 7, 3, count=70, batch=2, summarised=summarised)
    assert_equals_naive(case, 1e-5, torch.float32)


@pytest.mark.parametrize('window', [3, 7])
def test_full_windows_beside_summarised_ones(window):
    assert_equals_naive(full_and_idle_windows(window))


@pytest.mark.parametrize('chunk', [1, 40, 200])
def test_pieces_equal_the_whole(chunk, monkeypatch):
    case = problem(13, 11, 4, 2, count=100, batch=2)
    args = tensors(case)
    weight = torch.randn(len(args[0]), CHANNELS, dtype=torch.float64)

    def run():
        out = attend(case, *args)
        return out.detach(), *torch.autograd.grad((out * weight).sum(), args)

    whole, pieces = run(), len(list(windows._chunks(case.pack())))
    monkeypatch.setattr(windows, '_CHUNK', chunk)
    assert len(list(windows._chunks(case.pack()))) > pieces, 'nothing was cut'
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert_equals_naive(case)


@pytest.mark.parametrize(('most', 'sizes'), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_heads_in_groups(most, sizes, monkeypatch):
    bucket = problem(14, 14, 7).pack().buckets[0]
    monkeypatch.setattr(windows, '_CHUNK', most * bucket.num_windows * bucket.width**2)
    groups = list(windows._head_groups(5, bucket))
    assert [group.stop - group.start for group in groups] == sizes
    assert [head for group in groups for head in range(5)[group]] == list(range(5))


@given(problems(most=20, windows=(2, 7)))
@quick
def test_pieces_cover_all_windows_and_borders_stay_apart(case: Problem):
    packing = case.pack()
    before = windows._CHUNK
    windows._CHUNK = 150
    try:
        pieces = list(windows._chunks(packing))
    finally:
        windows._CHUNK = before
    end = 0
    for piece in pieces:
        assert piece.first == end
        assert piece.num_border in (0, piece.num_windows)
        assert piece.num_windows == 1 or piece.num_windows * piece.width**2 <= 150
        end += piece.num_windows * piece.width
    assert end == len(packing.rows)
    border = sum(bucket.num_border for bucket in packing.buckets)
    assert sum(piece.num_border for piece in pieces) == border


@pytest.mark.parametrize(('summarised', 'count'), [(False, 1), (True, 6)])
def test_numerical_gradients(summarised, count):
    case = problem(3, 4, 2, 1, count=count, summarised=summarised)
    assert torch.autograd.gradcheck(lambda *args: attend(case, *args), tensors(case))


def test_rows_without_a_place_are_zero():
    case = problem(4, 4, 4, summarised=True)
    qkv, blank, bias = tensors(case)
    out = attend(case, qkv, blank, bias)
    assert (out[-1] == 0).all()
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert (grad[-1] == 0).all()


def test_what_stands_in_empty_places_is_not_seen():
    """Any row may stand there, one that is not finite too."""
    case = problem(14, 14, 7, count=40)
    qkv, blank, bias = (part.detach() for part in tensors(case))
    want = attend(case, qkv, blank, bias)
    number = len(qkv) - 1
    other = qkv.clone()
    other[number] += 1e6
    window = case.layout.slot_ids[case.active[0]] // case.slots
    elsewhere = window != window[number]
    assert elsewhere.any()
    torch.testing.assert_close(attend(case, other, blank, bias)[elsewhere], want[elsewhere])


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_large_logits_stay_finite(scale):
    case = problem(9, 9, 4, 2, count=50)
    args = tensors(case, dtype=torch.float32)
    out = attend(case, scale * args[0], *args[1:], scale=1.0)
    grads = torch.autograd.grad(out.sum(), args)
    assert all(part.isfinite().all() for part in (out, *grads))


def test_nothing_but_the_arguments_is_kept_for_the_backward_pass():
    case = problem(28, 28, 7)
    args = tensors(case, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(case, *args)
    arguments = sum(part.numel() for part in args)
    assert arguments <= sum(part.numel() for part in kept) < 1.2 * arguments
