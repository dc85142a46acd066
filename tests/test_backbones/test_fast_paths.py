"""Whole backbones are the same by every path: squeezed or static windows, in pieces or whole."""

import copy

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    BlockTrace,
    assert_close,
    assert_same_gradients,
    gradients,
    image,
    parametrize,
    randomize,
)
from policy_cases import CASES
from window_cases import full_and_idle_windows

from idlevit_mm.layers import (
    FeedForward,
    MergePatches,
    ShiftWindowMSA,
    window_attention,
    window_slots,
    window_squeezed,
)
from idlevit_mm.layers.ffn import MixFFN
from idlevit_mm.layers.window_attention import WindowMSA
from idlevit_mm.ops import Selection, chunks

# One is a single row of tokens, one a single column.
SIZES = ((1, 3, 97, 131), (3, 3, 45, 58), (1, 3, 4, 40), (2, 3, 40, 4), (1, 3, 4, 4))
SWIN = tuple(v for v in BY_NAME.values() if v.is_swin)
POLICIES = tuple(case for case in CASES if case.variant.is_swin)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Calls:
    """How often methods were called while they were watched."""

    def __init__(self, monkeypatch, *methods):
        self.counts = dict.fromkeys((name for _, name in methods), 0)
        for owner, name in methods:
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name), name))

    def _watched(self, method, name):
        def watched(*args, **kwargs):
            self.counts[name] += 1
            return method(*args, **kwargs)

        return watched

    def take(self):
        """Counts since the last call."""
        counts = dict(self.counts)
        self.counts.update(dict.fromkeys(counts, 0))
        return counts


@pytest.fixture
def paths(monkeypatch):
    """Watches which path windows take."""
    return Calls(monkeypatch, (window_attention, 'attend_squeezed'), (window_slots, '_attend'))


def force_static(monkeypatch):
    monkeypatch.setattr(WindowMSA, 'squeezes', lambda self, qkv: False)


def assert_both_paths_equal(model, x, paths, monkeypatch):
    """Outputs, choices, and gradients of all parameters and of the image."""
    tol = TOLERANCE[x.dtype]
    outs, grads = gradients(model, x)
    masks = model.keep_masks
    squeezed = paths.take()
    with monkeypatch.context() as patch:
        force_static(patch)
        static_outs, static_grads = gradients(model, x)
        static = paths.take()
    assert squeezed['_attend'] == static['attend_squeezed'] == 0
    assert squeezed['attend_squeezed'] > 0
    assert static['_attend'] > 0
    for stage, other in zip(masks, model.keep_masks, strict=True):
        for mask, other_mask in zip(stage, other, strict=True):
            assert torch.equal(mask, other_mask)
    for number, (a, b) in enumerate(zip(outs, static_outs, strict=True)):
        assert_close(a, b, tol, f'output {number}')
    assert_same_gradients(grads, static_grads, tol)


def swin(variant, keep, dtype=torch.float64, **kwargs):
    return randomize(variant.build(keep_ratios=keep, **kwargs)).to(dtype).eval()


@parametrize(SWIN)
@pytest.mark.parametrize('keep', [1.0, 0.6, 0.3])
@pytest.mark.parametrize('size', SIZES, ids=lambda size: 'x'.join(map(str, size)))
def test_squeezed_equals_static(variant, size, keep, paths, monkeypatch):
    model = swin(variant, keep)
    assert_both_paths_equal(model, image(size, dtype=torch.float64), paths, monkeypatch)


@pytest.mark.parametrize('case', POLICIES, ids=[case.name for case in POLICIES])
@pytest.mark.parametrize('keep', [1.0, 0.6, 0.3])
def test_squeezed_equals_static_with_every_policy(case, keep, paths, monkeypatch):
    model = case.build(case.ratios(keep)).double()
    x = image((2, 3, 45, 58), dtype=torch.float64)
    assert_both_paths_equal(model, x, paths, monkeypatch)


@pytest.mark.parametrize('context', ['active', 'summary', 'all'])
@pytest.mark.parametrize('keep', [0.6, 0.3])
@pytest.mark.parametrize('size', SIZES, ids=lambda size: 'x'.join(map(str, size)))
def test_contexts_on_odd_maps(size, keep, context, paths, monkeypatch):
    model = swin(BY_NAME['swin'], keep, policy=dict(context=context))
    assert_both_paths_equal(model, image(size, dtype=torch.float64), paths, monkeypatch)


@parametrize(SWIN)
@pytest.mark.parametrize('keep', [1.0, 0.5])
def test_single_precision(variant, keep, paths, monkeypatch):
    model = swin(variant, keep, torch.float32)
    assert_both_paths_equal(model, image((2, 3, 45, 58)), paths, monkeypatch)


@pytest.mark.parametrize('context', ['active', 'summary', 'all'])
def test_recomputed_blocks(context, paths, monkeypatch):
    """Paths may differ between two passes, not within one; with_cp recomputes by the same."""
    options = dict(policy=dict(context=context), drop_path_rate=0.0)
    plain = swin(BY_NAME['swin-w7'], 0.5, **options).train()
    saving = swin(BY_NAME['swin-w7'], 0.5, with_cp=True, **options).train()
    x = image((2, 3, 45, 58), dtype=torch.float64)
    assert_both_paths_equal(saving, x, paths, monkeypatch)
    (outs, grads), (want, want_grads) = gradients(saving, x), gradients(plain, x)
    for a, b in zip(outs, want, strict=True):
        assert_close(a, b, 1e-10)
    assert_same_gradients(grads, want_grads, 1e-10)


@parametrize(SWIN[:2])
@pytest.mark.parametrize('keep', [1.0, 0.5])
def test_static_windows_equal_the_twin(variant, keep, monkeypatch):
    """What GPUs and compiled models run: dense at 1.0, idle rows untouched below."""
    force_static(monkeypatch)
    x = image((2, 3, 45, 58), dtype=torch.float64)
    model = swin(variant, keep)
    if keep == 1.0:
        twin = variant.build_twin().double()
        twin.eval()  # returns None in mmdet
        twin.load_state_dict(model.state_dict(), strict=True)
        outs, grads = gradients(model, x)
        want, want_grads = gradients(twin, x)
        for a, b in zip(outs, want, strict=True):
            assert_close(a, b, 1e-11)
        assert_same_gradients(grads, want_grads, 1e-10)
        return
    with BlockTrace(model) as trace, torch.no_grad():
        model(x)
    for calls, masks in zip(trace.calls, model.keep_masks, strict=True):
        for (before, after, _), mask in zip(calls, masks, strict=True):
            mask = mask.flatten(1)
            assert torch.equal(before[~mask], after[~mask])
            assert not torch.equal(before[mask], after[mask])


@pytest.mark.parametrize('window', [3, 7])
def test_summaries_beside_a_full_window(window, monkeypatch):
    case = full_and_idle_windows(window)
    attention = randomize(ShiftWindowMSA(8, 2, window)).double().eval()
    selection = Selection(case.active, case.active, False)
    x = torch.randn(1, case.rows, 8, dtype=torch.float64)
    got = attention(x, case.hw_shape, selection)
    force_static(monkeypatch)
    want = attention(x, case.hw_shape, selection)
    # Summaries of full windows stand for nothing.
    there = torch.ones(case.rows, dtype=torch.bool)
    there[case.active.shape[1] :: 2] = False
    assert_close(got[:, there], want[:, there], 1e-10)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    ('name', 'static'),
    [('plain', 0), ('dropout', 1), ('bfloat16', 1), ('autocast', 1), ('trace', 1), ('meta', 1)],
)
def test_which_path_is_taken(name, static, paths):
    rate = 0.5 if name == 'dropout' else 0.0
    device = 'meta' if name == 'meta' else 'cpu'
    dtype = torch.bfloat16 if name == 'bfloat16' else torch.float32
    attention = ShiftWindowMSA(8, 2, 4, attn_drop_rate=rate).to(device, dtype)
    attention.requires_grad_(False).train()
    x = torch.randn(1, 35, 8, device=device, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=name == 'autocast'), torch.no_grad():
        if name == 'trace':
            torch.jit.trace(lambda x: attention(x, (5, 7), None), x, check_trace=False)
        else:
            attention(x, (5, 7), None)
    assert paths.take() == {'attend_squeezed': 1 - static, '_attend': static}


def test_dropout_of_weights_acts_in_training_alone(paths):
    attention = randomize(ShiftWindowMSA(8, 2, 4, attn_drop_rate=0.5))
    x = torch.randn(1, 35, 8)
    attention.train()
    assert not torch.equal(attention(x, (5, 7), None), attention(x, (5, 7), None))
    assert paths.take()['_attend'] == 2
    attention.eval()
    assert torch.equal(attention(x, (5, 7), None), attention(x, (5, 7), None))
    assert paths.take()['attend_squeezed'] == 2


@parametrize((*FAMILIES, BY_NAME['swin-w7'], BY_NAME['pvt-conv-norm'], BY_NAME['vit-conv-stem']))
@pytest.mark.parametrize('keep', [1.0, 0.5])
def test_pieces_equal_the_whole(variant, keep, monkeypatch):
    ratios = [[1.0] + [keep] * (depth - 1) for depth in variant.depths] if variant.is_vit else keep
    model = swin(variant, ratios)
    x = image((2, 3, 97, 131), dtype=torch.float64)
    calls = Calls(
        monkeypatch,
        (FeedForward, 'forward'),
        (MixFFN, '_part'),
        (MergePatches, '_reduce'),
        (window_squeezed, '_weights'),
    )
    with torch.no_grad():
        want, whole = model(x), calls.take()
    with_gradients = [out.detach() for out in model(x)]
    calls.take()
    monkeypatch.setattr(chunks, '_CHUNK', 1)
    monkeypatch.setattr(chunks, '_MIN_ROWS', 50)
    monkeypatch.setattr(chunks, '_CHUNK', 1)
    monkeypatch.setattr(window_squeezed, '_CHUNK', 500)
    with torch.no_grad():
        got, pieces = model(x), calls.take()
    # With a convolution hidden features are cut by channels, and 32 of them no further.
    uncut = {'pvtv2', 'mit'}
    for name, number in whole.items():
        if number and not (name == '_part' and variant.name in uncut):
            assert pieces[name] > number, f'{name} was not cut'
    for a, b, c in zip(got, want, with_gradients, strict=True):
        assert_close(a, b, 1e-11)
        assert_close(c, b, 1e-11)


def test_wide_hidden_maps_in_pieces(monkeypatch):
    variant = BY_NAME['pvtv2']
    model = swin(variant, 0.5, mlp_ratios=[9, 9, 5, 5])
    x = image((2, 3, 45, 58), dtype=torch.float64)
    calls = Calls(monkeypatch, (MixFFN, '_part'))
    with torch.no_grad():
        want, whole = model(x), calls.take()['_part']
        monkeypatch.setattr(chunks, '_CHUNK', 1)
        got, pieces = model(x), calls.take()['_part']
    assert pieces >= 3 * whole
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize('keep', [1.0, 0.5])
@pytest.mark.parametrize('scope', ['map', 'windows'])
def test_tables_of_inference_serve_training(scope, keep, paths):
    """A map size that is met first in inference mode leaves its tables for training."""
    model = swin(BY_NAME['swin-w7'], keep, policy=dict(scope=scope)).train()
    x = image((1, 3, 61, 47 if scope == 'map' else 53), dtype=torch.float64)
    with torch.inference_mode():
        want = model.eval()(x)
    twin = copy.deepcopy(model)
    outs, grads = gradients(twin, x)
    for a, b in zip(outs, want, strict=True):
        assert_close(a, b, 1e-11)
    assert all(grad is not None for grad in grads.values())
    assert paths.take()['_attend'] == 0
