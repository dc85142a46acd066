"""Whole backbones are the same by every backend, and which one is taken is told in words."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    all_equal,
    assert_all_close,
    assert_close,
    assert_same_gradients,
    gradients,
    image,
    parametrize,
    randomize,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_cases import CASES, Case, each
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from window_cases import full_and_idle_windows

from idlevit_mm.backbones.pvt import IdlePVTBlock
from idlevit_mm.backbones.swin import IdleSwinBlock
from idlevit_mm.kernels import (
    BACKENDS,
    Reference,
    Site,
    backend_at,
    backend_for,
    cpu,
    site_of,
    slots,
    use_backend,
    why_not,
)
from idlevit_mm.kernels.cpu import native, pieces
from idlevit_mm.layers import FeedForward, MergePatches, ShiftWindowMSA
from idlevit_mm.ops import Rows, window_layout

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SWIN = tuple(v for v in BY_NAME.values() if v.is_swin)
# Without windows backends differ in whose scores are the best, and in how keys are found.
POLICIES = [
    *(case for case in CASES if case.variant.is_swin),
    *(
        Case(f'swinv2-{p}', BY_NAME['swinv2'], dict(type=p))
        for p in ('EViT', 'EvoViT', 'SparseViT')
    ),
    *('pvtv2-idlevit-summary', 'pvtv2-evit', 'vit-idlevit-map', 'vit-evit', 'vit-evovit'),
]
EAGER = Site('cpu', torch.float32, eager=True, traced=False, grad=False, autocast=False)
# Those that are held against the reference, where they can be taken at all.
# That of GPUs has tests of its own.
OTHERS = [backend.name for backend in BACKENDS if backend.name not in ('triton', 'reference')]
quick = settings(deadline=None, max_examples=40, derandomize=True)


class Calls(Counter):
    """How often functions were called while they were watched."""

    def watch(self, patch, *functions):
        for owner, name in functions:
            patch.setattr(owner, name, self._watched(getattr(owner, name), name))
        return self

    def _watched(self, function, name):
        def watched(*args, **kwargs):
            self[name] += 1
            return function(*args, **kwargs)

        return watched

    def take(self):
        """Counts since the last call."""
        counts = Counter(self)
        self.clear()
        return counts


@pytest.fixture
def paths(monkeypatch):
    """Watches which way windows go."""
    return watch_windows(monkeypatch)


def watch_windows(patch):
    return Calls().watch(patch, (native, 'attend_windows'), (slots, '_attend'))


def assert_backends_equal(model, x):
    """Outputs, choices, and gradients of all parameters and of the image."""
    tol = TOLERANCE[x.dtype]
    with use_backend('reference'):
        want, want_grads = gradients(model, x)
        want_masks = model.keep_masks
        with torch.no_grad():
            want_inferred = model(x)
    for name in OTHERS:
        with use_backend(name):
            outs, grads = gradients(model, x)
            masks = model.keep_masks
            with torch.no_grad():
                inferred = model(x)
        for stage, other in zip(masks, want_masks, strict=True):
            assert all_equal(stage, other)
        assert_all_close(outs, want, tol)
        assert_all_close(inferred, want_inferred, tol)
        assert_same_gradients(grads, want_grads, tol)


def build(variant, keep, dtype=torch.float64, **kwargs):
    return randomize(variant.build(keep_ratios=keep, **kwargs)).to(dtype).eval()


# Down to images of one pixel in height, and maps of one token.
sizes = st.tuples(st.sampled_from((1, 3)), st.just(3), st.integers(1, 60), st.integers(1, 60))
keeps = st.sampled_from((1.0, 0.6, 0.3, 1e-6))


@given(
    sizes,
    keeps,
    st.integers(1, 7),
    st.sampled_from(('active', 'summary', 'all')),
    st.sampled_from(('map', 'window_tokens', 'windows')),
)
@example((1, 3, 1, 60), 0.6, 7, 'active', 'map')
@example((3, 3, 45, 58), 0.3, 4, 'summary', 'map')
@example((3, 3, 45, 58), 0.3, 7, 'all', 'map')
@example((1, 3, 60, 4), 0.6, 3, 'active', 'windows')
@quick
def test_windows(size, keep, window, context, scope):
    """Both blocks, of which one is shifted."""
    # Two tokens are equally far from their mean: another scorer than the default.
    context = context if scope == 'map' else 'active'
    model = build(
        BY_NAME['swin'],
        keep,
        window_size=window,
        depths=(2,),
        num_heads=(2,),
        strides=(4,),
        out_indices=(0,),
        policy=dict(scope=scope, context=context, scorer='activation_norm'),
    )
    assert_backends_equal(model, image(size, dtype=torch.float64))


@given(
    sizes,
    keeps,
    st.sampled_from(('swin-w7', 'pvt', 'pvtv2', 'mit', 'vit', 'vit-conv-stem')),
    st.sampled_from((1, 2**8, 2**20)),
)
@example((1, 3, 1, 60), 0.6, 'pvt', 2**20)
@example((3, 3, 60, 1), 0.3, 'pvtv2', 1)
@example((1, 3, 1, 1), 0.3, 'vit', 1)
@quick
def test_families(size, keep, name, piece):
    """Whole or in pieces as small as they get."""
    model = build(BY_NAME[name], keep, policy=dict(scorer='activation_norm'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, '_PIECE', piece)
        patch.setattr(pieces, '_MIN_ROWS', 5)
        assert_backends_equal(model, image(size, dtype=torch.float64))


@each(POLICIES)
def test_every_policy(case):
    assert_backends_equal(case.build().double(), image((2, 3, 29, 46), dtype=torch.float64))


@pytest.mark.parametrize('keep', [1.0, 0.5])
def test_single_precision(keep):
    for variant in SWIN:
        assert_backends_equal(build(variant, keep, torch.float32), image((2, 3, 45, 58)))


@pytest.mark.parametrize('context', ['active', 'summary', 'all'])
def test_recomputed_blocks(context):
    """Ways may differ between two passes, not within one; with_cp recomputes by the same."""
    options = dict(policy=dict(context=context), drop_path_rate=0.0)
    plain = build(BY_NAME['swin-w7'], 0.5, **options).train()
    saving = build(BY_NAME['swin-w7'], 0.5, with_cp=True, **options).train()
    x = image((2, 3, 45, 58), dtype=torch.float64)
    assert_backends_equal(saving, x)
    (outs, grads), (want, want_grads) = gradients(saving, x), gradients(plain, x)
    assert_all_close(outs, want, 1e-10)
    assert_same_gradients(grads, want_grads, 1e-10)


@pytest.mark.parametrize('window', [3, 7])
def test_summaries_beside_a_full_window(window):
    case = full_and_idle_windows(window)
    attention = randomize(ShiftWindowMSA(8, 2, window)).double().eval()
    rows = Rows(case.active)
    x = torch.randn(1, case.rows, 8, dtype=torch.float64)
    got = attention(x, case.hw_shape, rows)
    with use_backend('reference'):
        want = attention(x, case.hw_shape, rows)
    # Summaries of full windows stand for nothing.
    there = torch.ones(case.rows, dtype=torch.bool)
    there[case.active.shape[1] :: 2] = False
    assert_close(got[:, there], want[:, there], 1e-10)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    ('name', 'static'),
    [
        ('plain', 0),
        ('bfloat16', 0),
        ('autocast', 0),
        ('double', 1),
        ('dropout', 1),
        ('trace', 1),
        ('meta', 1),
    ],
)
def test_which_way_windows_go(name, static, paths):
    rate = 0.5 if name == 'dropout' else 0.0
    device = 'meta' if name == 'meta' else 'cpu'
    dtype = {'bfloat16': torch.bfloat16, 'double': torch.float64}.get(name, torch.float32)
    attention = ShiftWindowMSA(32, 2, 4, attn_drop_rate=rate).to(device, dtype)
    attention.requires_grad_(False).train()
    x = torch.randn(1, 35, 32, device=device, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=name == 'autocast'), torch.no_grad():
        if name == 'trace':
            torch.jit.trace(lambda x: attention(x, (5, 7), None), x, check_trace=False)
        else:
            attention(x, (5, 7), None)
    assert (paths['attend_windows'], paths['_attend']) == (1 - static, static)


def test_dropout_of_weights_acts_in_training_alone(paths):
    attention = randomize(ShiftWindowMSA(32, 2, 4, attn_drop_rate=0.5))
    x = torch.randn(1, 35, 32)
    attention.train()
    assert not torch.equal(attention(x, (5, 7), None), attention(x, (5, 7), None))
    assert paths.take()['_attend'] == 2
    attention.eval()
    assert torch.equal(attention(x, (5, 7), None), attention(x, (5, 7), None))
    assert paths.take()['attend_windows'] == 2


@parametrize((*FAMILIES, BY_NAME['pvt-conv-norm']))
def test_pieces_equal_the_whole(variant, monkeypatch):
    ratios = [[1.0] + [0.5] * (depth - 1) for depth in variant.depths]
    # Hidden features of a convolution are cut by channels, and 32 of them no further.
    wide = dict(mlp_ratios=[9, 9, 5, 5]) if variant.name == 'pvtv2' else {}
    model = build(variant, ratios, **wide)
    x = image((2, 3, 97, 131), dtype=torch.float64)
    calls = Calls().watch(
        monkeypatch,
        (FeedForward, 'forward'),
        (MergePatches, '_reduce'),
        (Reference, 'convolve'),
        (pieces, 'in_pieces'),
    )
    # A product is called for each piece, and each part of the channels.
    calls.watch(monkeypatch, (cpu.CPU, 'product'), (cpu.CPU, 'linear'))
    with torch.no_grad():
        want, whole = model(x), calls.take()
    with_gradients = [out.detach() for out in model(x)]
    calls.take()
    monkeypatch.setattr(pieces, '_PIECE', 1)
    monkeypatch.setattr(pieces, '_MIN_ROWS', 50)
    with torch.no_grad():
        got, cut = model(x), calls.take()
    for name in ('forward', '_reduce'):
        assert not whole[name] or cut[name] > whole[name], f'{name} was not cut'
    if variant.name == 'pvtv2':
        assert cut['convolve'] >= 3 * whole['convolve'] > 0
    elif variant.name != 'mit':
        assert sum(cut.values()) > sum(whole.values())
    for a, b, c in zip(got, want, with_gradients, strict=True):
        assert_close(a, b, 1e-11)
        assert_close(c, b, 1e-11)


# Which one is taken


def recorded(why, seen):
    """Ask for the reasons while something is going on."""

    def ask(x):
        seen.append(why_not(site_of(x)))
        return x + 1

    x = torch.zeros(2, 3)
    if why == 'fake':
        with FakeTensorMode() as mode:
            ask(mode.from_tensor(x))
    elif why == 'traced':
        torch.jit.trace(ask, x, check_trace=False)
    elif why == 'exported by make_fx':
        make_fx(ask)(x)
    elif why == 'compiled':
        torch._dynamo.reset()
        torch.compile(lambda x: x * len(why_not(site_of(x))), backend='eager', fullgraph=True)(x)
        seen.append(
            torch.compile(lambda x: (x, why_not(site_of(x))), backend='eager', fullgraph=True)(x)[1]
        )
    else:
        ask(x.to('meta'))


@pytest.mark.parametrize(
    ('why', 'word'),
    [
        ('meta', 'lie on meta'),
        ('fake', 'graph is recorded'),
        ('traced', 'graph is recorded'),
        ('exported by make_fx', 'graph is recorded'),
        ('compiled', 'graph is recorded'),
    ],
)
def test_why_not_tells_in_words(why, word):
    seen = []
    recorded(why, seen)
    assert seen
    for reasons in seen:
        assert list(reasons) == ['triton', 'cpu']
        assert word in reasons['cpu']


def test_why_not_names_the_force_that_is_on():
    elsewhere = {'triton': 'the tokens lie on cpu'}
    assert why_not(EAGER) == elsewhere
    with use_backend('reference'):
        assert why_not(EAGER) == {**elsewhere, 'cpu': "use_backend('reference') is in force"}
        assert 'lie on cuda' in why_not(EAGER._replace(device='cuda'))['cpu']
    assert why_not(EAGER) == elsewhere


def test_the_innermost_force_counts_and_ends_with_its_context():
    x = torch.zeros(1)
    with use_backend('reference'):
        with use_backend('cpu'):
            assert backend_at(x).name == 'cpu'
        assert backend_at(x).name == 'reference'
        with pytest.raises(RuntimeError, match='own'), use_backend('cpu'):
            raise RuntimeError('own')
        assert backend_at(x).name == 'reference'
    assert backend_at(x).name == 'cpu'


def test_an_unknown_backend_is_refused_by_name():
    with (
        pytest.raises(
            ValueError, match="backend='none' is unknown; allowed: triton, cpu, reference"
        ),
        use_backend('none'),
    ):
        pass


# Backends of one's own


class Toy(Reference):
    """Takes over something, and counts how often."""

    name = 'toy'

    def __init__(self):
        self.calls = 0


class ToyLinear(Toy):
    """A small entry: single products, with gradients by autograd."""

    def product(self, x, weight, bias=None):
        self.calls += 1
        out = torch.einsum('...c,oc->...o', x, weight)
        return out if bias is None else out + bias

    def linear(self, x, layer):
        return self.product(x, layer.weight, layer.bias)


class ToyAttention(Toy):
    """The whole first half of Swin's block, for plans without summaries and other keys."""

    def attention_half(self, block, tokens, plan, keys):
        if not isinstance(block, IdleSwinBlock) or plan.keys == 'all' or plan.summary is not None:
            return None
        self.calls += 1
        msa, tokens = block.attn.w_msa, block.opened(tokens, plan)
        x = F.layer_norm(tokens.now, tokens.now.shape[-1:], block.norm1.weight, block.norm1.bias)
        qkv = F.linear(x, msa.qkv.weight, msa.qkv.bias)
        layout = window_layout(*tokens.hw_shape, msa.window_size, block.attn.shift_size, x.device)
        ids = None if plan.rows is None else plan.rows.ids
        out = slots.attend_slots(qkv, msa.core(x, tokens.hw_shape), layout, ids)
        out = F.linear(out, msa.proj.weight, msa.proj.bias)
        return tokens.become(tokens.now + out), None


@pytest.fixture(params=[ToyLinear, ToyAttention], ids=lambda cls: cls.__name__)
def toy(request):
    backend = request.param()
    before = list(BACKENDS)
    BACKENDS.append(backend)
    yield backend
    BACKENDS[:] = before


@pytest.mark.parametrize('name', ['swin', 'pvt'])
def test_a_backend_of_ones_own_equals_the_reference(toy, name):
    model, x = build(BY_NAME[name], 0.5), image((2, 3, 29, 46), dtype=torch.float64)
    results = []
    for taken in ('toy', 'reference'):
        with use_backend(taken):
            results.append(gradients(model, x))
    assert (toy.calls > 0) == (name == 'swin' or isinstance(toy, ToyLinear))
    (outs, grads), (want, want_grads) = results
    assert_all_close(outs, want, 1e-10)
    assert_same_gradients(grads, want_grads, 1e-10)


@pytest.mark.parametrize('forced', [False, True])
def test_the_first_that_can_be_taken_is(toy, forced):
    BACKENDS.remove(toy)
    BACKENDS.insert(0, toy)
    with use_backend('toy') if forced else nullcontext():
        assert backend_for(EAGER) is toy
        toy.why_not = lambda site: 'gradients are wanted' if site.grad else ''
        assert backend_for(EAGER) is toy
        grad = EAGER._replace(grad=True)
        assert backend_for(grad).name == ('reference' if forced else 'cpu')
        assert why_not(grad)['toy'] == 'gradients are wanted'


def test_where_the_forced_one_cannot_be_taken_the_reference_is(toy):
    toy.why_not = lambda site: 'never'
    with use_backend('toy'):
        assert type(backend_for(EAGER)) is Reference
        assert backend_for(EAGER).name == 'reference'


def test_a_backend_that_leaves_a_half_to_the_block_changes_nothing(monkeypatch):
    asked = []
    for half in ('attention_half', 'mlp_half'):
        monkeypatch.setattr(Reference, half, lambda self, *args, half=half: asked.append(half))
    model, x = build(BY_NAME['pvtv2'], 0.5), image((1, 3, 29, 46), dtype=torch.float64)
    with torch.no_grad():
        model(x)
    blocks = sum(isinstance(module, IdlePVTBlock) for module in model.modules())
    assert Counter(asked) == {'attention_half': blocks, 'mlp_half': blocks}
