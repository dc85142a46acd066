"""Pieces are cut where that pays and nowhere else, and equal the whole."""

import pytest
import torch
from backbone_zoo import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from idlevit_mm.kernels import CPU, Reference, backend_at, use_backend
from idlevit_mm.kernels.cpu import pieces
from idlevit_mm.kernels.cpu.pieces import channel_parts, in_pieces
from idlevit_mm.layers import FeedForward, MixFFN
from idlevit_mm.ops import Rows

DROP_PATH = dict(type='DropPath', drop_prob=0.5)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(pieces, '_PIECE', 1)
    monkeypatch.setattr(pieces, '_MIN_ROWS', 10)


class Watched:
    """A function of single tokens that remembers the sizes of its arguments."""

    def __init__(self):
        self.sizes = []
        self.layer = nn.Linear(3, 4).requires_grad_(False)

    def __call__(self, x):
        self.sizes.append(tuple(map(int, x.shape)))
        return self.layer(x)


@pytest.mark.usefixtures('tiny')
@pytest.mark.parametrize('shape', [(1, 11, 3), (3, 7, 3), (2, 30, 3)])
@pytest.mark.parametrize('inference', [torch.no_grad, torch.inference_mode])
def test_pieces_equal_the_whole(shape, inference):
    function, x = Watched(), torch.randn(shape)
    with inference():
        got = in_pieces(function, x, 8)
        assert len(function.sizes) == -(-shape[0] * shape[1] // 10)
        assert_close(got, function(x), 1e-6)
        # Strided tokens are cut alike.
        assert_close(in_pieces(function, x.mT.contiguous().mT, 8), got, 1e-6)


@pytest.mark.usefixtures('tiny')
def test_few_tokens_are_not_cut():
    function, x = Watched(), torch.randn(2, 5, 3)
    with torch.no_grad():
        backend_at(x).by_tokens(function, x, 8)
    assert function.sizes == [(2, 5, 3)]


@pytest.mark.usefixtures('tiny')
@pytest.mark.parametrize('why', ['gradients', 'random numbers', 'the reference'])
def test_nothing_is_cut_with(why):
    function, x = Watched(), torch.randn(2, 6, 3)
    name, training = 'cpu', why == 'random numbers'
    if why == 'the reference':
        name = 'reference'
    with use_backend(name), torch.set_grad_enabled(why == 'gradients'):
        backend_at(x).by_tokens(function, x, 8, training)
        assert backend_at(x).channel_parts(64, 100, training) == [slice(0, 64)]
    assert function.sizes == [(2, 6, 3)]
    with torch.no_grad():
        assert len(backend_at(x).channel_parts(64, 100)) == 2, 'and is without'


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.usefixtures('tiny')
def test_nothing_is_cut_in_graphs():
    function, x = Watched(), torch.randn(2, 6, 3)

    def run(x):
        assert type(backend_at(x)) is Reference
        return backend_at(x).by_tokens(function, x, 8)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.jit.trace(run, x, check_trace=False)
        assert function.sizes == [(2, 6, 3)]
        compiled = torch.compile(
            lambda x: backend_at(x).by_tokens(function, x, 8), backend='aot_eager', fullgraph=True
        )
        assert_close(compiled(x), function.layer(x), 1e-6)
        assert set(function.sizes) == {(2, 6, 3)}


def test_width_decides_how_many_tokens_a_piece_has(monkeypatch):
    monkeypatch.setattr(pieces, '_PIECE', 1000)
    monkeypatch.setattr(pieces, '_MIN_ROWS', 1)
    function = Watched()
    with torch.no_grad():
        in_pieces(function, torch.randn(1, 100, 3), 50)
    assert function.sizes == [(1, 20, 3)] * 5


@given(st.integers(1, 1000), st.integers(1, 1000), st.sampled_from((1, 500, 2**14, 2**20)))
@example(33, 1000, 1)
@example(32, 1, 500)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_channel_parts_follow_one_another(channels, pixels, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, '_PIECE', most)
        parts = channel_parts(channels, pixels)
    covered = [channel for part in parts for channel in range(channels)[part]]
    assert covered == list(range(channels))
    assert (len(parts) == 1) or channels * pixels > most, 'cut where it does not pay'
    number = -(-channels * pixels // most)
    for part in parts:
        width = part.stop - part.start
        assert width > 0
        assert width % 32 == 0 or part is parts[-1]
        assert width <= -(-channels // number // 32) * 32 or len(parts) == 1
        assert part.start % 32 == 0


def ffn(use_conv, **kwargs):
    torch.manual_seed(0)
    return MixFFN(8, 100, dict(type='GELU'), use_conv=use_conv, **kwargs).double()


@pytest.mark.parametrize(
    ('keep', 'summarised'), [(None, False), (1, False), (20, False), (20, True)]
)
def test_channel_by_channel_equals_the_whole_map(keep, summarised, monkeypatch):
    module, hw, batch = ffn(True).eval(), (7, 9), 2
    rows = None
    if keep is not None:
        rows = Rows(torch.rand(batch, 63).topk(keep).indices.sort().values)
    tokens = (keep or 63) + summarised
    x = torch.randn(batch, tokens, 8, dtype=torch.float64)
    whole = module(x, hw, rows).detach()
    calls = []
    convolve = CPU.convolve
    watched = lambda *args: calls.append(1) or convolve(*args)  # noqa: E731
    monkeypatch.setattr(CPU, 'convolve', watched)
    monkeypatch.setattr(pieces, '_PIECE', 1)
    with torch.no_grad():
        assert_close(module(x, hw, rows), whole, 1e-12)
    assert len(calls) == 4, 'nothing was cut'


@pytest.mark.usefixtures('tiny')
def test_stochastic_depth_drops_images_without_gradients_too():
    branch = FeedForward(8, 16, dropout_layer=DROP_PATH, add_identity=False).train()
    with torch.no_grad():
        x = torch.randn(6, 25, 8)
        out = backend_at(x).by_tokens(branch, x, 16, branch.training)
    dropped = (out == 0).all(-1)
    assert torch.equal(dropped.any(1), dropped.all(1)), 'images are dropped in part'


@pytest.mark.usefixtures('tiny')
def test_dropout_of_the_output_is_drawn_once_without_gradients_too():
    module = ffn(True, ffn_drop=0.5).train()
    with torch.no_grad():
        out = module(torch.randn(2, 63, 8, dtype=torch.float64), (7, 9), None)
    assert 0.4 < (out == 0).double().mean() < 0.6
