"""Index tables that are built first under some mode serve eager code afterwards.

They are cached by sizes alone: one that a tracer has left its mark on would stay for good.
"""

import pytest
import torch
from backbone_zoo import BY_NAME, assert_close, assert_same_gradients, gradients, image, randomize
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from idlevit_mm.kernels import use_backend
from idlevit_mm.ops import geometry, map_units, window_layout, window_units

pytestmark = pytest.mark.filterwarnings('ignore')
X = image((2, 3, 21, 30))
MODELS = {
    'map': ('swin', dict(policy=dict(scope='map', context='summary'))),
    'window_tokens': ('swin', dict(policy=dict(scope='window_tokens'))),
    'windows': ('swin', dict(policy=dict(scope='windows'))),
}


def forget():
    for cached in (geometry._shared, geometry.window_numbers):
        cached.cache_clear()


def build(name):
    name, options = MODELS[name]
    model = BY_NAME[name].build(keep_ratios=0.5, drop_path_rate=0.0, **options)
    return randomize(model).eval()


def under_fake_tensors(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(X))


def under_fake_tensors_alone(model):
    # Weights too: what is not fake is refused here.
    mode, state = FakeTensorMode(), model.state_dict()
    state = {name: mode.from_tensor(value) for name, value in state.items()}
    with mode:
        torch.func.functional_call(model, state, mode.from_tensor(X))


def under_export(model):
    torch.export.export(model, (X,), strict=False)


def under_make_fx(model):
    make_fx(model)(X)


def under_make_fx_of_fake_tensors(model):
    make_fx(model, tracing_mode='fake', _allow_non_fake_inputs=True)(X)


def under_inference_mode(model):
    with torch.inference_mode():
        model(X)


def under_jit_trace(model):
    torch.jit.trace(model, X, check_trace=False)


# Recording takes long: with these alone all kinds of tables are made by two of the models.
SLOW = {under_export: ['map'], under_make_fx: ['windows'], under_make_fx_of_fake_tensors: ['map']}
MODES = [value for key, value in list(globals().items()) if key.startswith('under_')]


@pytest.fixture(scope='module')
def wanted():
    """Outputs and gradients without any mode before."""
    found = {}
    for name in MODELS:
        forget()
        found[name] = gradients(build(name), X)
    return found


@pytest.mark.parametrize('mode', MODES, ids=lambda mode: mode.__name__)
def test_tables_serve_eager_code(mode, wanted, subtests):
    for name in SLOW.get(mode, MODELS):
        with subtests.test(name):
            assert_tables_serve(build(name), mode, *wanted[name])


def assert_tables_serve(model, mode, want, want_grads):
    forget()
    with torch.no_grad():
        mode(model)
    for backend in ('cpu', 'reference'):
        with use_backend(backend):
            outs, grads = gradients(model, X)
        for out, other in zip(outs, want, strict=True):
            assert type(out) is torch.Tensor
            assert_close(out, other, 1e-5)
        assert_same_gradients(grads, want_grads, 1e-4)


def test_tables_are_real_shared_and_of_no_mode():
    device, sizes = torch.device('cpu'), (5, 7, 4, 2)
    forget()
    with FakeTensorMode() as mode:
        fake = window_layout(*sizes, device)
        assert isinstance(fake.token_ids, FakeTensor)
        assert fake.token_ids.shape == (4, 16)
        assert all(type(side) is int for side in fake.token_ids.shape)
        assert window_layout(*sizes, device) is fake
        assert fake.token_ids.fake_mode is mode
    with torch.inference_mode():
        layout = window_layout(*sizes, device)
        units = window_units(*sizes, True, device), map_units(5, 7, device)
    for table in (*layout[:3], *(part.token_ids for part in units)):
        assert type(table) is torch.Tensor
        assert not table.is_inference()
    assert window_layout(*sizes, device) is layout
    assert window_layout(*sizes, torch.device('meta')).token_ids.is_meta
