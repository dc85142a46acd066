"""Linear layers by oneDNN equal ``F.linear``."""

import pytest
import torch
import torch.nn.functional as F
from operations import count

from idlevit_mm.kernels import CPU, backend_at
from idlevit_mm.kernels.cpu import linear as by_cpu

# Multiply-adds from which on oneDNN is taken.
MOST = 2**23
SHAPES = ((1, 5), (255, 5), (256, 5), (2, 301, 5), (2, 17, 19, 5), (0, 5))
ONEDNN = {'aten::mkldnn_convolution', 'mkldnn::_linear_pointwise'}


@pytest.fixture
def eager(monkeypatch):
    """oneDNN from 256 rows on for the small matrices here."""
    monkeypatch.setattr(by_cpu, '_MIN_PRODUCT', 256 * 5 * 7)
    monkeypatch.setattr(by_cpu, '_MAX_NATIVE', 0)


def linear(x, weight, bias=None):
    return backend_at(x).product(x, weight, bias)


class Layer(torch.nn.Linear):
    """Called by the backend's way, as layers of ours call theirs."""

    def forward(self, x):
        return backend_at(x).product(x, self.weight, self.bias)


def parts(shape, bias=True, dtype=torch.float32, out=7):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype)]
    if bias:
        tensors.append(torch.randn(out, dtype=dtype))
    return [t.requires_grad_() for t in tensors]


def by_onednn(*args):
    return bool(ONEDNN & set(count(linear, *args).counts))


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_values_and_gradients(shape):
    assert_values_and_gradients(parts(shape))


@pytest.mark.usefixtures('eager')
def test_values_and_gradients_without_bias():
    assert_values_and_gradients(parts((2, 301, 5), bias=False))


def assert_values_and_gradients(args):
    got, want = linear(*args), F.linear(*args)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weight = torch.randn(want.shape)
    grads = torch.autograd.grad((got * weight).sum(), args)
    wants = torch.autograd.grad((want * weight).sum(), args)
    for a, b in zip(grads, wants, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures('eager')
def test_second_derivatives():
    args = parts((300, 3), out=2)
    seconds = []
    for function in (linear, F.linear):
        (first,) = torch.autograd.grad(function(*args).pow(3).sum(), args[0], create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), args[1])[0])
    torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('view', ['transposed', 'every other', 'expanded'])
def test_strided_inputs_and_parts_of_a_weight(view):
    x = {
        'transposed': torch.randn(5, 400).t(),
        'every other': torch.randn(400, 10)[:, ::2],
        'expanded': torch.randn(1, 5).expand(400, 5),
    }[view]
    weight, bias = torch.randn(21, 10), torch.randn(21)
    args = x, weight[7:14, :5], bias[7:14]
    torch.testing.assert_close(linear(*args), F.linear(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('rows', 'chosen'), [(2047, False), (2048, True), (5000, True)])
def test_onednn_from_a_number_of_multiply_adds_on(rows, chosen):
    assert MOST == 2048 * 64 * 64
    assert by_onednn(*parts((rows, 64), out=64)) == chosen


@pytest.mark.usefixtures('eager')
def test_nothing_is_copied():
    x, weight, bias = parts((2, 300, 16), out=8)
    assert by_onednn(x, weight, bias)
    operations = count(linear, x, weight, bias)
    assert operations.copied == []
    assert operations.launches == 1, operations.counts


@pytest.mark.usefixtures('eager')
def test_double_precision_is_the_plain_product():
    args = parts((400, 5), dtype=torch.float64)
    assert not by_onednn(*args)
    assert torch.equal(linear(*args), F.linear(*args))


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_the_plain_product(dtype):
    args = parts((400, 5))
    with torch.autocast('cpu', dtype):
        assert not by_onednn(*args)
        got, want = linear(*args), F.linear(*args)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert by_onednn(*args), 'and again outside'


@pytest.mark.usefixtures('eager')
def test_no_onednn_where_it_is_switched_off():
    args = parts((400, 5))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(*args)


@pytest.mark.usefixtures('eager')
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_traced_graphs_hold_matrix_products():
    layer = Layer(5, 7)
    x = torch.randn(400, 5)
    traced = torch.jit.trace(layer, x)
    text = str(traced.inlined_graph)
    assert 'aten::linear' in text
    assert 'conv' not in text
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.usefixtures('eager')
def test_compiled_layer():
    torch._dynamo.reset()
    layer = Layer(5, 7)
    compiled = torch.compile(layer, backend='aot_eager')
    for rows in (10, 400):
        x = torch.randn(rows, 5)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures('eager')
def test_other_devices_take_the_plain_product():
    out = linear(*(t.to('meta') for t in parts((400, 5))))
    assert out.shape == (400, 7)


@pytest.mark.usefixtures('eager')
def test_a_plain_layer_is_taken_apart_and_any_other_called():
    layer, x = torch.nn.Linear(5, 7), torch.randn(400, 5)
    want = layer(x)
    assert ONEDNN & set(count(CPU().linear, x, layer).counts)
    torch.testing.assert_close(CPU().linear(x, layer), want, rtol=1e-5, atol=1e-5)
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    assert not ONEDNN & set(count(CPU().linear, x, layer).counts)
    torch.testing.assert_close(CPU().linear(x, layer), 2 * want)
