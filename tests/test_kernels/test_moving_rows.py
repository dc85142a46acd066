"""Rows are taken out of a sequence and put back as by plain indexing, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlevit_mm.kernels import put_rows, take_rows, use_backend
from idlevit_mm.kernels.backends import backend_at
from idlevit_mm.kernels.rows import fill_map
from idlevit_mm.ops import Rows

quick = settings(deadline=None, max_examples=60, derandomize=True)
BACKENDS = ('cpu', 'reference')


@st.composite
def problems(draw):
    """A sequence (B, S, C) and distinct rows of it, some of which may be padding."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, size = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    count = draw(st.integers(1, size))
    ids = torch.rand(batch, size, generator=generator).topk(count).indices
    padded = draw(st.booleans())
    if padded:
        ids[torch.rand(ids.shape, generator=generator) < draw(st.sampled_from((0.0, 0.3)))] = -1
    x = torch.randn(batch, size, draw(st.integers(1, 3)), generator=generator, dtype=torch.float64)
    return x, Rows(ids, padded=padded)


def places(rows):
    """Image and id of every row that is no padding."""
    image, _ = torch.nonzero(rows.ids >= 0, as_tuple=True)
    return image, rows.ids[rows.ids >= 0]


@given(problems(), st.sampled_from(BACKENDS))
@quick
def test_values(problem, name):
    x, rows = problem
    real = rows.ids >= 0
    before, values = x.clone(), torch.randn(*rows.ids.shape, x.shape[2], dtype=x.dtype)
    with use_backend(name):
        backend = backend_at(x)
        taken, put = backend.take(x, rows), backend.put(x, rows, values)
        assert torch.equal(backend.put(x, rows, taken), x), 'putting back changes something'
    assert torch.equal(taken[real], x[places(rows)])
    want = x.clone()
    want[places(rows)] = values[real]
    assert torch.equal(put, want)
    assert torch.equal(x, before), 'the input was written to'
    assert put.data_ptr() != x.data_ptr()


@given(problems(), st.booleans())
@quick
def test_gradients(problem, traced):
    x, rows = problem
    x.requires_grad_()
    real = rows.ids >= 0
    values = torch.randn(*rows.ids.shape, x.shape[2], dtype=x.dtype, requires_grad=True)
    weight_take, weight_put = torch.randn_like(values) * real[..., None], torch.randn_like(x)

    def grads(take, put):
        # What stands in places of padding is any: only real ones enter the result.
        picked = torch.where(real[..., None], take, 0.0)
        loss = (picked * weight_take).sum() + (put.square() * weight_put).sum()
        return torch.autograd.grad(loss, (x, values))

    plain_take = torch.zeros_like(values)
    plain_take = plain_take.index_put(real.nonzero(as_tuple=True), x[places(rows)])
    plain_put = x.index_put(places(rows), values[real])
    want = grads(plain_take, plain_put)
    got = grads(take_rows(x, rows, traced), put_rows(x, rows, values))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_has_no_gradient_even_if_one_comes():
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    rows = Rows(torch.tensor([[-1, 1, -1]]), padded=True)
    (grad,) = torch.autograd.grad(take_rows(x, rows).sum(), x)
    assert grad.tolist() == [[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]]


def test_values_of_another_precision_take_that_of_the_sequence():
    x, rows = torch.zeros(2, 4, 3), Rows(torch.tensor([[1], [3]]))
    out = put_rows(x, rows, torch.ones(2, 1, 3, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert out.sum() == 6


@pytest.mark.parametrize('strided', [False, True])
def test_a_map_of_blanks_and_rows(strided):
    x, blank = torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    x = x.mT.contiguous().mT if strided else x
    rows = Rows(torch.tensor([[0, 2, 5], [4, 1, 3]]))
    filled = fill_map(blank, 6, rows, x)
    want = blank.repeat(1, 6, 1)
    for image in range(2):
        want[image, rows.ids[image]] = x[image]
    assert torch.equal(filled, want)
