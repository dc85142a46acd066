"""Merging without unfolding equals mmcv's patch merging."""

import pytest
import torch
from backbone_zoo import assert_close, assert_same_gradients, gradients, randomize
from mmcv.cnn.bricks.transformer import PatchMerging
from operations import count

from idlevit_mm.kernels.cpu import pieces
from idlevit_mm.layers import MergePatches

LN = dict(type='LN')
OPTIONS = {
    'norm': dict(norm_cfg=LN),
    'bias': dict(norm_cfg=LN, bias=True),
    'no norm': dict(norm_cfg=None),
    'fixed norm': dict(norm_cfg=dict(type='LN', elementwise_affine=False)),
    'eps': dict(norm_cfg=dict(type='LN', eps=1e-2)),
    'same': dict(norm_cfg=LN, padding='same'),
}
# What unfolding alone can do.
FALLBACKS = {
    'stride 1': dict(norm_cfg=LN, stride=1),
    'kernel 3': dict(norm_cfg=LN, kernel_size=3, stride=2),
    'dilation': dict(norm_cfg=LN, dilation=2),
    'padding': dict(norm_cfg=LN, padding=1),
}


def pair(options, channels=3, dtype=torch.float64):
    mine = randomize(MergePatches(channels, 5, **options)).to(dtype)
    theirs = PatchMerging(channels, 5, **options).to(dtype)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    return mine, theirs


def assert_merges_alike(mine, theirs, size, batch=2, tol=1e-12):
    x = torch.randn(batch, size[0] * size[1], 3, dtype=next(mine.parameters()).dtype)
    shapes = mine(x, size)[1], theirs(x, size)[1]
    assert tuple(map(int, shapes[0])) == tuple(map(int, shapes[1]))
    (got,), grads = gradients(First(mine, size), x)
    (want,), want_grads = gradients(First(theirs, size), x)
    assert_close(got, want, tol)
    assert_same_gradients(grads, want_grads, tol)


class First(torch.nn.Module):
    """Tokens alone, without the new size."""

    def __init__(self, merge, size):
        super().__init__()
        self.merge = merge
        self.size = size

    def forward(self, x):
        return (self.merge(x, self.size)[0],)


@pytest.mark.parametrize('name', OPTIONS)
def test_equals_mmcv(name):
    mine, theirs = pair(OPTIONS[name])
    assert mine._pairs(), 'the fast way is not taken'
    assert_merges_alike(mine, theirs, (7, 5))


@pytest.mark.parametrize('name', ['norm', 'same'])
def test_equals_mmcv_on_odd_maps(name):
    for size in ((8, 6), (1, 9), (6, 1), (1, 1)):
        assert_merges_alike(*pair(OPTIONS[name]), size)


@pytest.mark.parametrize('name', FALLBACKS)
def test_other_cells_are_unfolded(name):
    mine, theirs = pair(FALLBACKS[name])
    assert not mine._pairs()
    assert_merges_alike(mine, theirs, (7, 6))


def test_single_precision_above_the_row_threshold():
    mine, theirs = pair(OPTIONS['norm'], dtype=torch.float32)
    assert_merges_alike(mine, theirs, (41, 37), tol=1e-5)


@pytest.mark.parametrize('size', [(13, 9), (12, 8)], ids=str)
def test_pieces_equal_the_whole(size, monkeypatch):
    mine, theirs = pair(OPTIONS['norm'])
    x = torch.randn(3, size[0] * size[1], 3, dtype=torch.float64)
    calls = []
    reduce = mine._reduce
    monkeypatch.setattr(mine, '_reduce', lambda cells: calls.append(1) or reduce(cells))
    monkeypatch.setattr(pieces, '_PIECE', 1)
    monkeypatch.setattr(pieces, '_MIN_ROWS', 5)
    with torch.no_grad():
        assert_close(mine(x, size)[0], theirs(x, size)[0], 1e-12)
    assert len(calls) > 1, 'nothing was cut'


def test_one_copy_of_the_map():
    mine, theirs = pair(OPTIONS['norm'], dtype=torch.float32)
    x = torch.randn(1, 64 * 48, 3)
    assert count(mine, x, (64, 48)).copies_of_at_least(x.numel()) == 1
    assert 'aten::im2col' in count(theirs, x, (64, 48)).counts
