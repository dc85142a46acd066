"""Feed-forward networks equal mmcv's and mmdet's, and what they keep is packed."""

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import assert_close, randomize
from mmcv.cnn.bricks.transformer import FFN

from idlevit_mm.layers import FeedForward, MixFFN
from idlevit_mm.ops import Selection

HW = (5, 7)
F64 = torch.float64


def selected(keep, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(batch, HW[0] * HW[1], generator=generator).topk(keep).indices.sort().values
    return Selection(ids, ids, False)


def mix(hidden=6, bias=True, **kwargs):
    module = randomize(MixFFN(4, hidden, dict(type='GELU'), use_conv=True, **kwargs)).double()
    if not bias:
        module.layers[1].bias = None
    return module.eval()


def plain(module, x, selection):
    """Convolve a map that holds the active tokens, and the summary or zeros elsewhere."""
    first, conv, act, _, second, _ = module.layers
    hidden = F.linear(x, first.weight.flatten(1), first.bias)
    count = selection.token_ids.shape[1]
    active, summary = hidden[:, :count], hidden[:, count:]
    canvas = summary if summary.shape[1] else active.new_zeros(len(x), 1, hidden.shape[2])
    canvas = canvas.expand(-1, HW[0] * HW[1], -1)
    index = selection.token_ids[..., None].expand(-1, -1, hidden.shape[2])
    maps = canvas.scatter(1, index, active).mT.unflatten(2, HW)
    out = F.conv2d(maps, conv.weight, conv.bias, padding=1, groups=len(conv.weight))
    out = out.flatten(2).mT.gather(1, index)
    if summary.shape[1]:
        bias = 0.0 if conv.bias is None else conv.bias
        alike = summary * conv.weight.sum((1, 2, 3)) + bias
        out = torch.cat([out, alike], dim=1)
    return F.linear(act(out), second.weight.flatten(1), second.bias)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('summarised', [False, True])
@pytest.mark.parametrize('keep', [1, 12, 34, 35])
def test_active_tokens_among_the_map_with_all_gradients(keep, summarised, bias):
    module, selection = mix(bias=bias), selected(keep)
    x = torch.randn(2, keep + summarised, 4, dtype=F64, requires_grad=True)
    inputs = [x, *module.parameters()]
    got, want = module(x, HW, selection), plain(module, x, selection)
    assert_close(got, want, 1e-12)
    weight = torch.randn(got.shape, dtype=F64)
    grads = torch.autograd.grad((got * weight).sum(), inputs)
    wants = torch.autograd.grad((want * weight).sum(), inputs)
    for a, b in zip(grads, wants, strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize('summarised', [False, True])
def test_numerical_gradients(summarised):
    module, selection = mix(hidden=2), selected(5, batch=1)
    x = torch.randn(1, 5 + summarised, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, HW, selection), (x,))


def test_gradients_where_the_convolution_is_frozen():
    module, selection = mix(), selected(12)
    module.layers[1].requires_grad_(False)
    x = torch.randn(2, 12, 4, dtype=F64, requires_grad=True)
    got, want = module(x, HW, selection), plain(module, x, selection)
    grads, wants = (torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want))
    assert_close(grads, wants, 1e-11)


def test_no_map_is_kept_for_the_backward_pass():
    module, selection = mix(hidden=32), selected(7)
    x = torch.randn(2, 7, 4, dtype=F64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x, HW, selection)
    a_map = 2 * HW[0] * HW[1] * 32
    assert max(part.numel() for part in kept) < a_map / 2


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_active_tokens_under_autocast(dtype):
    module, selection = mix(hidden=32).float().train(), selected(12)
    x = torch.randn(2, 12, 4, requires_grad=True)
    with torch.autocast('cpu', dtype):
        got = module(x, HW, selection)
    got.float().sum().backward()
    assert_close(got.float(), plain(module, x, selection), 0.05)
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('add_identity', [True, False])
@pytest.mark.parametrize('identity', [True, False])
@pytest.mark.parametrize('rows', [20, 3000])
def test_two_layers_equal_mmcv(rows, identity, add_identity):
    mine = randomize(FeedForward(16, 64, add_identity=add_identity)).eval()
    theirs = FFN(16, 64, add_identity=add_identity).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x, other = torch.randn(2, rows, 16), torch.randn(2, rows, 16)
    other = other if identity else None
    assert_close(mine(x, other), theirs(x, other), 1e-5)
