"""The kernels in C compute what PyTorch does, where they may and only there."""

from typing import ClassVar

import pytest
import torch
from backbone_zoo import BY_NAME, all_equal, image, randomize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from window_cases import Problem, full_and_idle_windows, problem, problems

from idlevit_mm.analysis.flops import MultiplyAddCounter
from idlevit_mm.kernels import CPU, Reference, WindowCore, backends, use_backend
from idlevit_mm.kernels.cpu import native
from idlevit_mm.ops import Rows
from idlevit_mm.policies import MeanDistance

HEADS, CHANNELS = 2, 32
quick = settings(deadline=None, max_examples=40, derandomize=True)
pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=f'no kernels: {native.why_not()}')


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that are called."""
    names, call = [], native._call
    monkeypatch.setattr(
        native, '_call', lambda name, *args: (names.append(name), call(name, *args))
    )
    return names


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(case, dtype=torch.float32):
    """Random qkv of all packed rows of a batch, that of padding, and a bias of all slot pairs."""
    shapes = (
        (case.batch * case.rows, 3 * CHANNELS),
        (3 * CHANNELS,),
        (HEADS, case.slots, case.slots),
    )
    parts = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return [part.to(dtype).requires_grad_() for part in parts]


def attend(case, qkv, blank, bias, scale=0.7):
    core = WindowCore(
        bias[None], blank, case.window, HEADS, scale, hides_padding=case.hides_padding
    )
    rows, qkv = Rows(case.active), qkv.unflatten(0, (case.batch, -1))
    return CPU().attend_windows(qkv, core, case.hw_shape, case.shift, rows).flatten(0, 1)


def naive(case, qkv, blank, bias, scale=0.7):
    """Window by window and head by head, without any packing: (R, C)."""
    out = qkv.new_zeros(len(qkv), CHANNELS)
    rows = torch.cat([qkv, blank[None]])
    for (number, window), occupied in case.occupied().items():
        numbers = [case.row(number, window, slot) for slot in occupied]
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


def assert_equals_naive(case, dtype=torch.float32, tol=1e-4):
    args, exact = tensors(case, dtype), [part.detach().double() for part in tensors(case, dtype)]
    exact = [part.requires_grad_() for part in exact]
    got, want = attend(case, *args), naive(case, *exact)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)
    weight = normal(*got.shape, seed=9)
    grads = torch.autograd.grad((got * weight.to(dtype)).sum(), args)
    wants = torch.autograd.grad((want * weight).sum(), exact)
    for name, one, other in zip(('qkv', 'blank', 'bias'), grads, wants, strict=True):
        far = (one.double() - other).abs().max() / other.abs().max().clamp(min=1)
        assert far < tol, name


@given(problems(most=11, windows=(1, 4)))
@example(problem(1, 13, 7, 3, count=5, batch=2))
@example(problem(13, 11, 7, 3, count=90, batch=2))
@example(problem(13, 11, 7, 3, count=30, batch=2, summarised=True))
@example(problem(5, 9, 4, 2, batch=3, summarised=True))
@example(problem(13, 11, 7, count=60, batch=2, summarised=True, hides_padding=True))
@example(full_and_idle_windows(3))
@example(full_and_idle_windows(7))
@quick
def test_attention_in_windows_and_its_gradients(case: Problem):
    assert_equals_naive(case)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_single_precision(dtype, calls):
    assert_equals_naive(problem(13, 11, 7, 3, count=90, batch=2), dtype, 3e-2)
    assert set(calls) == {'attend'}


def test_rows_without_a_place_are_zero():
    case = problem(4, 4, 4, summarised=True)
    qkv, blank, bias = tensors(case)
    out = attend(case, qkv, blank, bias)
    assert (out[-1] == 0).all()
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert (grad[-1] == 0).all()


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_large_logits_stay_finite(scale):
    case = problem(9, 9, 4, 2, count=50)
    args = tensors(case)
    out = attend(case, scale * args[0], *args[1:], scale=1.0)
    grads = torch.autograd.grad(out.sum(), args)
    assert all(part.isfinite().all() for part in (out, *grads))


def test_nothing_but_the_arguments_is_kept_for_the_backward_pass():
    args, kept = tensors(problem(28, 28, 7)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(problem(28, 28, 7), *args)
    arguments = sum(part.numel() for part in args)
    assert arguments <= sum(part.numel() for part in kept) < 1.2 * arguments


def test_gradients_are_the_same_every_time():
    case = problem(28, 30, 7, 3, count=400, batch=2)
    args = tensors(case)
    first, *others = [torch.autograd.grad(attend(case, *args).sum(), args) for _ in range(4)]
    for other in others:
        assert all_equal(first, other)


@pytest.mark.parametrize('summarised', [False, True])
def test_multiply_adds_are_those_of_occupied_slots(summarised):
    case = problem(13, 11, 4, 2, count=60, batch=2, summarised=summarised)
    pairs = 0
    for occupied in case.occupied().values():
        pairs += len(occupied) ** 2
    layout = case.layout.token_ids
    padded = {window: int((tokens < 0).sum()) for window, tokens in enumerate(layout)}
    # Padding is a key, and no query.
    for (_, window), occupied in case.occupied().items():
        pairs -= padded[window] * len(occupied)
    args = tensors(case)
    counter = MultiplyAddCounter()
    with counter:
        out = attend(case, *args)
    assert counter.multiply_adds == 2 * pairs * CHANNELS
    with counter:
        out.sum().backward()
    assert counter.multiply_adds == 4 * pairs * CHANNELS


def test_numbers_that_are_none_stay_so():
    case = problem(8, 8, 4, 0, count=64)
    qkv = normal(1, 64, 3 * CHANNELS)
    qkv[0, 0, 0] = float('nan')
    core = WindowCore(torch.zeros(1, HEADS, 16, 16), torch.zeros(3 * CHANNELS), 4, HEADS, 0.3)
    with torch.no_grad():
        got, want = (
            one.attend_windows(qkv, core, (8, 8), 0, Rows(case.active)).isnan()
            for one in (CPU(), Reference())
        )
    assert want.any()
    assert torch.equal(got, want)


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from((1, 5, 16, 37, 64)),
    st.floats(0.1, 1.0),
    st.booleans(),
    st.sampled_from((1, 3, 5)),
)
@example(2, 1, 9, 37, 0.5, True, 3)
@quick
def test_convolution_of_rows(batch, height, width, channels, share, filled, side):
    tokens = height * width
    count = max(1, int(share * tokens))
    ids = torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(batch)])
    weight, bias = normal(channels, 1, side, side), normal(channels, seed=1)
    x, blank = normal(batch, count, channels, seed=2), normal(batch, 1, channels, seed=3)
    args = x, blank if filled else None, weight, bias, (height, width), Rows(ids)
    with torch.no_grad():
        got, want = CPU().convolve(*args), Reference().convolve(*args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@given(
    st.integers(1, 3),
    st.lists(
        st.sampled_from((0.0, -0.0, 1.5, -2.0, float('inf'), float('-inf'), float('nan'), 1e-40)),
        min_size=1,
        max_size=60,
    ),
    st.floats(0, 1),
)
@quick
def test_the_best_are_the_first_of_equal_ones(batch, values, share):
    scores = torch.tensor(values).expand(batch, 1, -1)
    count = max(1, round(share * len(values)))
    with torch.no_grad():
        got = CPU().best(scores, (count,))
    order = torch.sort(scores[:, 0], dim=1, descending=True, stable=True).indices
    assert torch.equal(got, order[:, :count].sort(dim=1).values)


def test_the_best_of_many():
    scores = normal(2, 1, 5000)
    with torch.no_grad():
        got = CPU().best(scores, (1800,))
    assert torch.equal(got, scores[:, 0].topk(1800).indices.sort(dim=1).values)


@pytest.mark.parametrize('channels', [1, 16, 37])
def test_distance(channels):
    x, other = normal(3, 11, channels), normal(3, 1, channels, seed=1)
    with torch.no_grad():
        got = CPU().distance(x, other)
    torch.testing.assert_close(got, (x - other).norm(dim=-1))


@pytest.mark.parametrize('padded', [False, True])
def test_rows_are_put_back(padded, calls):
    x, values = normal(3, 11, 5), normal(3, 4, 5, seed=1)
    ids = torch.tensor([[0, 3, 4, 10], [1, 2, 9, 10], [5, 6, 7, -1 if padded else 8]])
    rows = Rows(ids, padded=padded)
    with torch.no_grad():
        want = Reference().put(x, rows, values)
        got = CPU().put(x, rows, values)
        assert torch.equal(got, want)
        assert not torch.equal(got, x)
        # An expanded map is copied first.
        assert torch.equal(CPU().overwrite(x[:1].expand(3, -1, -1), rows, values)[0], want[0])
        assert torch.equal(CPU().overwrite(x, rows, values), want)
    assert torch.equal(x, want)
    assert set(calls) == {'put'}


@pytest.mark.parametrize(
    'name', ['swin-w7', 'swinv2', 'pvt', 'pvtv2', 'mit', 'svt-odd', 'vitdet-sam', 'vit']
)
def test_families(name, calls):
    # Heads of 16 channels, which the kernel of attention in windows takes.
    wide = dict(embed_dims=32) if 'swin' in name or name == 'vitdet-sam' else {}
    # Two tokens are equally far from their mean: another scorer than the default.
    for policy in ('IdleViT', 'EvoViT'):
        config = dict(keep_ratios=0.5, policy=dict(type=policy, scorer='activation_norm'))
        model = randomize(BY_NAME[name].build(**config, **wide)).eval()
        for size in ((1, 3, 97, 131), (3, 3, 40, 17), (1, 3, 1, 70)):
            calls.clear()
            assert_as_the_reference(model, image(size))
            assert calls
            assert ('attend' in calls) == (name not in ('pvt', 'pvtv2', 'mit', 'vit'))


@torch.no_grad()
def assert_as_the_reference(model, pixels):
    outs, masks = model(pixels), model.keep_masks
    with use_backend('reference'):
        wants = model(pixels)
    for mask, want in zip(sum(masks, []), sum(model.keep_masks, []), strict=True):
        assert torch.equal(mask, want)
    for out, want in zip(outs, wants, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('how', ['gradients', 'double', 'switched off'])
def test_where_they_are_not_used(how, calls, monkeypatch):
    model = randomize(BY_NAME['pvtv2'].build(keep_ratios=0.5)).eval()
    pixels = image((1, 3, 64, 64))
    if how == 'switched off':
        monkeypatch.setenv('IDLEVIT_MM_NATIVE', '0')
    if how == 'double':
        model, pixels = model.double(), pixels.double()
    with torch.set_grad_enabled(how == 'gradients'):
        model(pixels)
    # Choosing needs no gradient.
    assert set(calls) <= ({'distance', 'best'} if how == 'gradients' else set())


@pytest.mark.parametrize(
    ('compiler', 'words'), [('none-such', 'no C compiler'), ('false', 'false')]
)
def test_without_a_compiler_pytorch_computes(compiler, words, monkeypatch, tmp_path):
    monkeypatch.setenv('CC', compiler)
    monkeypatch.setenv('IDLEVIT_MM_CACHE', str(tmp_path))
    native._library.cache_clear()
    lines = []
    monkeypatch.setattr(backends, 'print_log', lambda line, *_: lines.append(line))
    try:
        assert words in native.why_not()
        model = BY_NAME['pvt'].build(keep_ratios=0.5).eval()
        with torch.no_grad():
            model(image((1, 3, 32, 32)))
        assert lines == [f'The kernels for cpu are not used: {native.why_not()}']
        x = normal(1, 4, 3)
        with torch.no_grad():
            torch.testing.assert_close(CPU().distance(x, x[:, :1]), (x - x[:, :1]).norm(dim=-1))
    finally:
        native._library.cache_clear()


class Collecting(MeanDistance):
    """Keeps what it has seen."""

    held: ClassVar[list] = []

    def forward(self, seen):
        self.held.append((seen.tokens, seen.tokens.clone()))
        return super().forward(seen)


# Who asks whether somebody can hold the map is the same in all families.
@pytest.mark.parametrize(
    ('name', 'holder'),
    [
        *(('swin', h) for h in ('block', 'block before', 'norm', 'scorer', 'own scorer', '')),
        *(('pvt', h) for h in ('norm', 'scorer')),
        *(('vit', h) for h in ('block before', '')),
    ],
)
def test_nobody_sees_the_map_change(name, holder):
    """Rows are put back in place only where nobody can hold the map."""
    model = randomize(BY_NAME[name].build(keep_ratios=0.5)).eval()
    blocks = model.idle_blocks[0]
    held = []

    def hold(module, args, *out):
        for x in (*args[:1], *(part[0] if isinstance(part, tuple) else part for part in out)):
            tokens = getattr(x, 'tokens', x)
            held.append((tokens, tokens.clone()))

    block, norm = blocks[1], next(m for m in blocks[1].children() if hasattr(m, 'eps'))
    scorer = block.policy.scorer
    if holder == 'block':
        block.register_forward_pre_hook(hold)
    elif holder == 'block before':
        blocks[0].register_forward_hook(hold)
    elif holder == 'norm':
        norm.register_forward_hook(hold)
    elif holder == 'scorer':
        scorer.register_forward_pre_hook(hold)
    elif holder == 'own scorer':
        block.policy.scorer, held = Collecting(scorer.embed_dims), Collecting.held
    assert_as_the_reference(model, image((2, 3, 40, 64)))
    assert bool(held) == bool(holder)
    for tokens, copy in held:
        assert torch.equal(tokens, copy)
