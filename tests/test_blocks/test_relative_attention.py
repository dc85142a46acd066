"""ViTDet's attention: what idle tokens are to active ones, in windows and in the whole map."""

import pytest
import torch
from backbone_zoo import BY_NAME, all_equal, assert_close, randomize

from idlevit_mm.kernels import use_backend
from idlevit_mm.kernels.cpu import pieces
from idlevit_mm.ops import Rows

HW = 7, 11
DOUBLE = torch.float64


def attention(**kwargs):
    """Blocks of windows of 3 and of the whole map; tables of the map are of another size."""
    model = randomize(BY_NAME['vitdet'].build(**kwargs)).double().eval()
    return {'windows': model.layers[0].attn, 'map': model.layers[2].attn}


def expected(attn, x, active):
    """By mmpretrain's functions on all tokens, with the keys of idle ones hidden."""
    vit_sam = pytest.importorskip('mmpretrain.models.backbones.vit_sam')
    size = attn.window_size
    x, hidden = x.unflatten(1, HW), (~active).unflatten(1, HW)[..., None].double()
    if size:
        x, padded = vit_sam.window_partition(x, size)
        hidden, _ = vit_sam.window_partition(hidden, size)
    batch, *sides, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, -1, 3, attn.num_heads, 4).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.flatten(1, 2)
    logits = query * attn.scale @ key.transpose(-1, -2)
    tables = attn.rel_pos_h, attn.rel_pos_w, sides, sides
    logits = vit_sam.add_decomposed_rel_pos(logits, query, *tables)
    mask = -1e9 * hidden.reshape(batch, 1, 1, -1).expand(-1, attn.num_heads, -1, -1).flatten(0, 1)
    out = ((logits + mask).softmax(-1) @ value).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    out = attn.proj(out).unflatten(1, sides)
    if size:
        out = vit_sam.window_unpartition(out, size, padded, HW)
    return out.flatten(1, 2)


@pytest.mark.parametrize('where', ['windows', 'map'])
@pytest.mark.parametrize('backend', ['cpu', 'reference'])
def test_idle_tokens_are_no_keys(where, backend, monkeypatch):
    # The CPU takes the queries of large maps in pieces, and so these.
    monkeypatch.setattr(pieces, '_PIECE', 2**10)
    attn = attention()[where]
    x = torch.randn(2, 77, 8, dtype=DOUBLE)
    ids = torch.stack([torch.randperm(77)[:40] for _ in range(2)])
    active = torch.zeros(2, 77, dtype=torch.bool).scatter(1, ids, True)
    index = ids[..., None].expand(-1, -1, 8)
    with use_backend(backend), torch.no_grad():
        dense = attn(x, HW)
        idle = attn(x.gather(1, index), HW, Rows(ids))
        with_context = attn(x.gather(1, index), HW, Rows(ids), x)
    assert_close(dense, expected(attn, x, torch.ones_like(active)), 1e-12)
    assert_close(idle, expected(attn, x, active).gather(1, index), 1e-12)
    assert_close(with_context, dense.gather(1, index), 1e-12)


def test_a_summary_of_idle_tokens_has_no_place(monkeypatch):
    """It attends and is seen without position bias, in pieces of queries as in one."""
    attn, x = attention()['map'], torch.randn(2, 41, 8, dtype=DOUBLE)
    ids = torch.stack([torch.randperm(77)[:40] for _ in range(2)])
    query, key, value = (
        part.unflatten(-1, (2, 4)).transpose(1, 2) for part in attn.qkv(x).split(8, -1)
    )
    bias = torch.zeros(2, 2, 41, 41, dtype=DOUBLE)
    bias[..., :40, :40] = attn.pairs(HW)(query, ids=ids, key_ids=ids)
    weights = (query @ key.transpose(-1, -2) * attn.scale + bias).softmax(-1)
    want = attn.proj((weights @ value).transpose(1, 2).flatten(2))
    monkeypatch.setattr(pieces, '_PIECE', 2**10)
    for backend in ('cpu', 'reference'):
        with use_backend(backend), torch.no_grad():
            assert_close(attn(x, HW, Rows(ids)), want, 1e-12, backend)


@pytest.mark.parametrize('where', ['windows', 'map'])
def test_kept_share_is_that_of_the_mean_logits(where):
    """A map of one window, so that both are the softmax over the mean over heads."""
    attn = attention(window_size=7)[where]
    hw, x, mask = (7, 7), torch.randn(2, 49, 8, dtype=DOUBLE), torch.rand(2, 49).round().double()
    query, key = (
        part.unflatten(-1, (2, 4)).transpose(1, 2) for part in attn.qkv(x).split(8, -1)[:2]
    )
    bias = attn.pairs(hw)(query)
    assert bias.abs().mean() > 0.1
    weights = (query @ key.transpose(-1, -2) * attn.scale + bias).mean(1).softmax(-1)
    assert_close(attn.kept_share(x, hw, mask), (weights @ mask[..., None]).squeeze(-1), 1e-12)


def test_tables_fold_for_good():
    model = randomize(BY_NAME['vitdet'].build()).eval()
    x = torch.randn(1, 3, 28, 44)
    with torch.no_grad():
        before = model(x)
        model.fold_table(HW)
        assert model.layers[2].attn.rel_pos_w.shape == (21, 4)
        assert model.layers[0].attn.rel_pos_w.shape == (5, 4)
        assert all_equal(model(x), before)
