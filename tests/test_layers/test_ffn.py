"""Feed-forward networks equal mmcv's and mmdet's, and what they keep is packed."""

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import assert_all_close, assert_close, randomize
from mmcv.cnn.bricks.transformer import FFN

from idlevit_mm.layers import FeedForward, MixFFN
from idlevit_mm.ops import Rows

HW = (5, 7)
F64 = torch.float64


def chosen(keep, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.rand(batch, HW[0] * HW[1], generator=generator).topk(keep).indices)


def mix(hidden=6, bias=True, **kwargs):
    module = randomize(MixFFN(4, hidden, dict(type='GELU'), use_conv=True, **kwargs)).double()
    if not bias:
        module.layers[1].bias = None
    return module.eval()


def plain(module, x, rows):
    """Convolve a map that holds the active tokens, and the summary or zeros elsewhere."""
    first, conv, act, _, second, _ = module.layers
    hidden = F.linear(x, first.weight.flatten(1), first.bias)
    count = rows.ids.shape[1]
    active, summary = hidden[:, :count], hidden[:, count:]
    canvas = summary if summary.shape[1] else active.new_zeros(len(x), 1, hidden.shape[2])
    canvas = canvas.expand(-1, HW[0] * HW[1], -1)
    index = rows.ids[..., None].expand(-1, -1, hidden.shape[2])
    maps = canvas.scatter(1, index, active).mT.unflatten(2, HW)
    out = F.conv2d(maps, conv.weight, conv.bias, padding=1, groups=len(conv.weight))
    out = out.flatten(2).mT.gather(1, index)
    if summary.shape[1]:
        bias = 0.0 if conv.bias is None else conv.bias
        alike = summary * conv.weight.sum((1, 2, 3)) + bias
        out = torch.cat([out, alike], dim=1)
    return F.linear(act(out), second.weight.flatten(1), second.bias)


@pytest.mark.parametrize(
    ('keep', 'summarised', 'bias'),
    [(1, False, True), (12, True, True), (34, False, False), (34, True, False), (35, True, True)],
)
def test_active_tokens_among_the_map_with_all_gradients(keep, summarised, bias):
    module, rows = mix(bias=bias), chosen(keep)
    x = torch.randn(2, keep + summarised, 4, dtype=F64, requires_grad=True)
    inputs = [x, *module.parameters()]
    got, want = module(x, HW, rows), plain(module, x, rows)
    assert_close(got, want, 1e-12)
    weight = torch.randn(got.shape, dtype=F64)
    grads = torch.autograd.grad((got * weight).sum(), inputs)
    wants = torch.autograd.grad((want * weight).sum(), inputs)
    assert_all_close(grads, wants, 1e-11)


@pytest.mark.parametrize('summarised', [False, True])
def test_numerical_gradients(summarised):
    module, rows = mix(hidden=2), chosen(5, batch=1)
    x = torch.randn(1, 5 + summarised, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, HW, rows), (x,))


def test_gradients_where_the_convolution_is_frozen():
    module, rows = mix(), chosen(12)
    module.layers[1].requires_grad_(False)
    x = torch.randn(2, 12, 4, dtype=F64, requires_grad=True)
    got, want = module(x, HW, rows), plain(module, x, rows)
    grads, wants = (torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want))
    assert_close(grads, wants, 1e-11)


def test_no_map_is_kept_for_the_backward_pass():
    module, rows = mix(hidden=32), chosen(7)
    x = torch.randn(2, 7, 4, dtype=F64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x, HW, rows)
    a_map = 2 * HW[0] * HW[1] * 32
    assert max(part.numel() for part in kept) < a_map / 2


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_active_tokens_under_autocast(dtype):
    module, rows = mix(hidden=32).float().train(), chosen(12)
    x = torch.randn(2, 12, 4, requires_grad=True)
    with torch.autocast('cpu', dtype):
        got = module(x, HW, rows)
    got.float().sum().backward()
    assert_close(got.float(), plain(module, x, rows), 0.05)
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('summarised', [False, True])
@pytest.mark.parametrize('keep', [None, 12])
def test_a_convolution_that_is_called_equals_one_that_is_taken_apart(keep, summarised):
    module, rows = mix(), None if keep is None else chosen(keep)
    count = (keep or HW[0] * HW[1]) + (summarised and keep is not None)
    x = torch.randn(2, count, 4, dtype=F64)
    want, calls = module(x, HW, rows), []
    module.layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert_close(module(x, HW, rows), want, 1e-12)
    assert calls


@pytest.mark.parametrize(
    ('count', 'identity', 'add_identity'),
    [(20, False, True), (20, True, True), (20, True, False), (3000, False, True)],
)
def test_two_layers_equal_mmcv(count, identity, add_identity):
    mine = randomize(FeedForward(16, 64, add_identity=add_identity)).eval()
    theirs = FFN(16, 64, add_identity=add_identity).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x, other = torch.randn(2, count, 16), torch.randn(2, count, 16)
    other = other if identity else None
    assert_close(mine(x, other), theirs(x, other), 1e-5)
