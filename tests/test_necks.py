"""The simple feature pyramid against a computation of its own, and its errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import all_equal, assert_all_close, assert_close, gradients, image
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from idlevit_mm.layers import LayerNorm2d
from idlevit_mm.necks import SimpleFeaturePyramid

FACTORS = (4.0, 2.0, 1.0, 0.5)
# Square, odd, one row, one column, one pixel; batch 1 and 3.
SIZES = [(1, 8, 8), (3, 5, 7), (1, 1, 6), (3, 9, 1), (1, 1, 1)]


def pyramid(dtype=torch.float64, **kwargs) -> SimpleFeaturePyramid:
    """A small neck whose every parameter, norms included, is drawn at random."""
    torch.manual_seed(0)
    neck = SimpleFeaturePyramid(**{**dict(in_channels=8, out_channels=6), **kwargs}).to(dtype)
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=0.5)
    return neck


def feature_map(size: tuple[int, int, int], channels: int = 8, dtype=torch.float64) -> Tensor:
    return image((size[0], channels, *size[1:]), dtype=dtype)


def naive_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]


def naive_double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every pixel becomes a 2x2 patch by one matrix product."""
    patches = torch.einsum('bchw,cdij->bdhiwj', x, weight)
    b, d, h, _, w, _ = patches.shape
    return patches.reshape(b, d, 2 * h, 2 * w) + bias[:, None, None]


def naive_halve(x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    rows = [x[:, :, i : i + 2].amax(2) for i in range(0, h, 2)]
    x = torch.stack(rows, 2)
    return torch.stack([x[..., j : j + 2].amax(3) for j in range(0, w, 2)], 3)


def naive_convs(x: Tensor, p: list[Tensor]) -> Tensor:
    """1x1 and 3x3 convolution, each with its norm; the 3x3 one as nine shifted products."""
    x = naive_norm(torch.einsum('bchw,dc->bdhw', x, p[0][:, :, 0, 0]), p[1], p[2])
    h, w = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    total = 0.0
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + h, j : j + w]
            total = total + torch.einsum('bchw,dc->bdhw', window, p[3][:, :, i, j])
    return naive_norm(total, p[4], p[5])


def naive_level(x: Tensor, factor: float, p: list[Tensor]) -> Tensor:
    """One level from the level's parameters in the order of their registration."""
    if factor == 4:
        x = naive_norm(naive_double(x, p[0], p[1]), p[2], p[3])
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        x, p = naive_double(x, p[4], p[5]), p[6:]
    elif factor == 2:
        x, p = naive_double(x, p[0], p[1]), p[2:]
    elif factor == 0.5:
        x = naive_halve(x)
    return naive_convs(x, p)


@pytest.mark.parametrize('size', SIZES)
def test_the_naive_computation_agrees(size: tuple[int, int, int]) -> None:
    neck, x = pyramid(num_outs=6), feature_map(size)
    outs = neck([torch.full_like(x, torch.nan), x])
    assert isinstance(outs, tuple)
    assert len(outs) == 6
    for factor, level, out in zip(FACTORS, neck.levels, outs, strict=False):
        expected = naive_level(x, factor, list(level.parameters()))
        assert_close(out, expected, 1e-10, f'factor {factor}')
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])
    assert torch.equal(outs[5], outs[3][:, :, ::4, ::4])


def test_a_tensor_a_tuple_and_a_list_are_the_same() -> None:
    neck, x = pyramid(), feature_map((2, 3, 5))
    for inputs in ((x,), [torch.zeros(1), x]):
        assert all_equal(neck(inputs), neck(x))


@pytest.mark.parametrize(
    ('norm_cfg', 'num_outs'), [(dict(type='LN2d'), 5), (dict(type='BN'), None), (None, 5)]
)
def test_every_parameter_has_a_gradient(norm_cfg: dict | None, num_outs: int | None) -> None:
    neck = pyramid(norm_cfg=norm_cfg, num_outs=num_outs)
    _, grads = gradients(neck, feature_map((2, 5, 3)))
    for name, grad in grads.items():
        assert grad is not None, f'{name} has no gradient'
        assert torch.isfinite(grad).all()
        assert grad.abs().sum() > 0, f'the gradient of {name} is zero'


@pytest.mark.parametrize('size', [(1, 5, 7), (3, 8, 8)])
def test_channels_last_changes_nothing(size: tuple[int, int, int]) -> None:
    neck, x = pyramid(), feature_map(size)
    last = copy.deepcopy(neck).to(memory_format=torch.channels_last)
    plain, plain_grads = gradients(neck, x)
    outs, grads = gradients(last, x.to(memory_format=torch.channels_last))
    assert_all_close(outs, plain, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, plain_grads[name], 1e-12, name)


def test_layer_norm_2d_keeps_channels_last_memory() -> None:
    x = feature_map((2, 3, 5)).to(memory_format=torch.channels_last)
    norm = LayerNorm2d(8).double()
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    assert_close(norm(x), naive_norm(x, norm.weight, norm.bias), 1e-12)


def test_convolutions_have_a_bias_only_without_norm() -> None:
    biased = {
        name for name, _ in pyramid(norm_cfg=None).named_parameters() if name.endswith('conv.bias')
    }
    assert len(biased) == 8
    assert biased.isdisjoint(dict(pyramid().named_parameters()))


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg'])
def test_builds_in_every_scope(scope: str) -> None:
    pytest.importorskip(scope)
    cfg = dict(type='SimpleFeaturePyramid', in_channels=8, norm_cfg=dict(type='LN2d', eps=0.1))
    with DefaultScope.overwrite_default_scope(scope):
        neck = MODELS.build(cfg)
    neck.init_weights()
    norms = [module for module in neck.modules() if isinstance(module, LayerNorm2d)]
    assert len(norms) == 9
    assert {norm.eps for norm in norms} == {0.1}
    assert [out.shape[1] for out in neck(torch.rand(1, 8, 2, 2))] == [256] * 4


WRONG_SETTINGS = [
    (dict(scale_factors=()), r'scale_factors=\(\); allowed: one or more of \(4.0, 2.0'),
    (dict(scale_factors=(3,)), r'scale_factors=\(3,\); allowed'),
    (dict(scale_factors=(1, 2)), r'scale_factors=\(1, 2\); allowed.*decreasing'),
    (dict(scale_factors=(2, 2)), r'scale_factors=\(2, 2\); allowed.*decreasing'),
    (dict(num_outs=3), 'num_outs=3 is less than the 4 levels'),
    (dict(in_channels=6), 'in_channels=6; allowed: a multiple of 4'),
    (dict(in_channels=7, scale_factors=(2,)), 'in_channels=7; allowed: a multiple of 2'),
    (dict(in_channels=0, scale_factors=(0.5,)), 'in_channels=0; allowed'),
    (dict(out_channels=0), 'out_channels=0; allowed: 1 or more'),
]


def test_wrong_settings(subtests: pytest.Subtests) -> None:
    for kwargs, message in WRONG_SETTINGS:
        with subtests.test(str(kwargs)), pytest.raises(ValueError, match=message):
            pyramid(**kwargs)


def test_channels_may_be_odd_where_nothing_is_enlarged() -> None:
    neck = pyramid(in_channels=7, scale_factors=(1.0, 0.5))
    assert len(neck(feature_map((1, 4, 4), channels=7))) == 2


@pytest.mark.parametrize(
    ('inputs', 'error', 'message'),
    [
        ([], ValueError, 'inputs holds no map'),
        ([[torch.zeros(1, 8, 2, 2), torch.zeros(1, 8)]], TypeError, 'is a list.*output_cls_token'),
        ([torch.zeros(1, 9, 2, 2)], ValueError, r'shape \(1, 9, 2, 2\).*in_channels=8'),
        (torch.zeros(1, 4, 8), ValueError, r'shape \(1, 4, 8\); allowed: \(B, 8, H, W\)'),
    ],
)
def test_wrong_inputs(inputs: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pyramid()(inputs)
