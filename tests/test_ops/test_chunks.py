"""Pieces are cut where that pays and nowhere else, and equal the whole."""

import pytest
import torch
from backbone_zoo import assert_close
from torch import nn

from idlevit_mm.layers import FeedForward, MixFFN
from idlevit_mm.ops import Selection, chunks, in_chunks
from idlevit_mm.ops.chunks import channel_parts

DROP_PATH = dict(type='DropPath', drop_prob=0.5)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(chunks, '_CHUNK', 1)
    monkeypatch.setattr(chunks, '_MIN_ROWS', 10)
    monkeypatch.setattr(chunks, '_CHUNK', 1)


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
        got = in_chunks(function, x, 8)
        assert len(function.sizes) == -(-shape[0] * shape[1] // 10)
        assert_close(got, function(x), 1e-6)
        # Strided tokens are cut alike.
        assert_close(in_chunks(function, x.mT.contiguous().mT, 8), got, 1e-6)


@pytest.mark.usefixtures('tiny')
def test_few_tokens_are_not_cut():
    function, x = Watched(), torch.randn(2, 5, 3)
    with torch.no_grad():
        in_chunks(function, x, 8)
    assert function.sizes == [(2, 5, 3)]


@pytest.mark.usefixtures('tiny')
def test_nothing_is_cut_with_gradients():
    function, x = Watched(), torch.randn(2, 6, 3)
    in_chunks(function, x, 8)
    assert function.sizes == [(2, 6, 3)]
    assert channel_parts(64, 100, x) == [slice(0, 64)]


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.usefixtures('tiny')
def test_nothing_is_cut_in_graphs():
    function, x = Watched(), torch.randn(2, 6, 3)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.jit.trace(lambda x: in_chunks(function, x, 8), x, check_trace=False)
        assert function.sizes == [(2, 6, 3)]
        compiled = torch.compile(
            lambda x: in_chunks(function, x, 8), backend='aot_eager', fullgraph=True
        )
        assert_close(compiled(x), function.layer(x), 1e-6)
        assert set(function.sizes) == {(2, 6, 3)}


def test_width_decides_how_many_tokens_a_piece_has(monkeypatch):
    monkeypatch.setattr(chunks, '_CHUNK', 1000)
    monkeypatch.setattr(chunks, '_MIN_ROWS', 1)
    function = Watched()
    with torch.no_grad():
        in_chunks(function, torch.randn(1, 100, 3), 50)
    assert function.sizes == [(1, 20, 3)] * 5


@pytest.mark.parametrize('channels', [1, 31, 32, 33, 256, 1000])
@pytest.mark.parametrize('pixels', [1, 7, 64, 1000])
@pytest.mark.parametrize('most', [1, 500, 2**14])
def test_channel_parts_follow_one_another(channels, pixels, most, monkeypatch):
    monkeypatch.setattr(chunks, '_CHUNK', most)
    with torch.no_grad():
        parts = channel_parts(channels, pixels, torch.zeros(1))
    covered = [channel for part in parts for channel in range(channels)[part]]
    assert covered == list(range(channels))
    for part in parts:
        width = part.stop - part.start
        assert width > 0
        assert width * pixels <= max(most, 32 * pixels) or width % 32 == 0
        assert part.start % 32 == 0


def ffn(use_conv, **kwargs):
    torch.manual_seed(0)
    return MixFFN(8, 100, dict(type='GELU'), use_conv=use_conv, **kwargs).double()


@pytest.mark.parametrize('summarised', [False, True])
@pytest.mark.parametrize('keep', [None, 1, 20])
def test_channel_by_channel_equals_the_whole_map(keep, summarised, monkeypatch):
    module, hw, batch = ffn(True).eval(), (7, 9), 2
    selection = None
    if keep is not None:
        ids = torch.rand(batch, 63).topk(keep).indices.sort().values
        selection = Selection(ids, ids, False)
    tokens = (keep or 63) + (summarised and keep is not None)
    x = torch.randn(batch, tokens, 8, dtype=torch.float64)
    whole = module(x, hw, selection).detach()
    calls = []
    part = module._part
    monkeypatch.setattr(module, '_part', lambda *args: calls.append(1) or part(*args))
    monkeypatch.setattr(chunks, '_CHUNK', 1)
    with torch.no_grad():
        assert_close(module(x, hw, selection), whole, 1e-12)
    assert len(calls) == 4, 'nothing was cut'


@pytest.mark.usefixtures('tiny')
def test_stochastic_depth_drops_images_without_gradients_too():
    branch = FeedForward(8, 16, dropout_layer=DROP_PATH, add_identity=False).train()
    with torch.no_grad():
        out = in_chunks(branch, torch.randn(6, 25, 8), 16, branch.training)
    dropped = (out == 0).all(-1)
    assert torch.equal(dropped.any(1), dropped.all(1)), 'images are dropped in part'


@pytest.mark.usefixtures('tiny')
def test_dropout_of_the_output_is_drawn_once_without_gradients_too():
    module = ffn(True, ffn_drop=0.5).train()
    with torch.no_grad():
        out = module(torch.randn(2, 63, 8, dtype=torch.float64), (7, 9), None)
    assert 0.4 < (out == 0).double().mean() < 0.6
