"""Attention head by head equals PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from operations import count

from idlevit_mm.kernels import split_heads
from idlevit_mm.kernels.cpu import attention, pieces
from idlevit_mm.layers import SelfAttention


def parts(batch, queries, keys, channels):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(batch, size, channels, generator=generator) for size in sizes]


@pytest.mark.parametrize('most', [2**20, 1])
@pytest.mark.parametrize(('batch', 'queries', 'keys', 'heads'), [(1, 301, 37, 1), (3, 259, 300, 4)])
def test_equals_fused_attention(batch, queries, keys, heads, most, monkeypatch):
    monkeypatch.setattr(pieces, '_PIECE', most)
    tensors = parts(batch, queries, keys, 8 * heads)
    with torch.no_grad():
        got = attention.attend(*tensors, heads)
    want = F.scaled_dot_product_attention(*(split_heads(part, heads) for part in tensors))
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def test_taken_at_inference_of_many_pairs_alone(monkeypatch):
    monkeypatch.setattr(attention, '_MIN_PAIRS', 50 * 50)
    module = SelfAttention(16, 2, attn_drop=0.5)

    def fused(tokens):
        return any('scaled_dot_product' in name for name in count(module, tokens).counts)

    large, small = torch.randn(2, 50, 16), torch.randn(2, 49, 16)
    module.eval()
    assert not fused(large)
    assert fused(small)
    module.train()
    assert not torch.equal(module(large)[0], module(large)[0]), 'dropout of the weights'
    module.eval()
    by_head, _ = module(large)
    with torch.no_grad():
        torch.testing.assert_close(module(large)[0], by_head, rtol=1e-5, atol=1e-5)


def pays(query, key):
    return attention.pays(query, key)


def test_where_it_does_not_pay():
    query = torch.zeros(1, 2**8, 8)
    with torch.no_grad():
        assert pays(query, query)
        assert not pays(query[:, 1:], query)
        assert not pays(query.double(), query.double())
        with torch.autocast('cpu', torch.bfloat16):
            assert not pays(query, query)
    assert not pays(query, query), 'gradients need the fused operation'
