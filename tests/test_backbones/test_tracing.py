"""Traced and exported backbones compute what eager ones do, for other batches too, or refuse."""

import copy
import inspect

import pytest
import torch
from backbone_zoo import BY_NAME, assert_close, image, randomize
from mmengine.analysis import get_model_complexity_info

NAMES = ('swin', 'pvt', 'pvtv2', 'mit', 'vit', 'vit-no-cls')
FAMILIES = pytest.mark.parametrize('name', NAMES)
SIZE = (3, 21, 30)

pytestmark = pytest.mark.filterwarnings('ignore')


def build(name, keep, **kwargs):
    variant = BY_NAME[name]
    return randomize(variant.build(keep_ratios=keep, drop_path_rate=0.0, **kwargs)).eval()


def images(batch, seed=1):
    return image((batch, *SIZE), seed)


def assert_same(outs, want, tol=1e-5):
    assert len(outs) == len(want)
    for number, (out, other) in enumerate(zip(outs, want, strict=True)):
        assert_close(out, other, tol, f'output {number}')


def traced(model, batch, grad=False):
    with torch.set_grad_enabled(grad):
        return torch.jit.trace(model, images(batch, 0), check_trace=False)


@FAMILIES
@pytest.mark.parametrize(
    ('keep', 'grad'), [(1.0, False), (0.5, False), (0.5, True)], ids=['dense', 'idle', 'idle-grad']
)
def test_a_trace_of_one_image_is_right_for_several(name, keep, grad):
    model = build(name, keep)
    graph = traced(model, 1, grad)
    with torch.no_grad():
        for batch in (1, 3):
            assert_same(graph(images(batch)), model(images(batch)))


@FAMILIES
def test_a_trace_of_two_images_is_right_for_one_and_three(name):
    model = build(name, 0.5)
    graph = traced(model, 2)
    with torch.no_grad():
        for batch in (1, 2, 3):
            assert_same(graph(images(batch)), model(images(batch)))


@pytest.mark.parametrize(
    ('name', 'policy'),
    [
        ('swin', dict(scope='window_tokens')),
        ('swin', dict(scope='windows')),
        ('swin', dict(context='summary')),
        ('swin', dict(context='all')),
        ('swin', dict(type='EViT')),
        ('swin', dict(type='EvoViT')),
        ('swin', dict(type='SparseViT')),
        ('pvtv2', dict(context='summary')),
        ('vit', dict(type='EViT')),
        ('vit', dict(type='EvoViT')),
        ('vit', dict(scorer='mean_query')),
    ],
    ids=str,
)
def test_traces_with_other_policies(name, policy):
    ratios = [[1.0] + [0.6] * (depth - 1) for depth in BY_NAME[name].depths]
    model = build(name, ratios, policy=policy)
    for batch in (1, 2):
        graph = traced(model, batch)
        with torch.no_grad():
            for other in (1, 3):
                assert_same(graph(images(other)), model(images(other)))


@FAMILIES
def test_complexity_is_counted_below_a_ratio_of_one(name):
    """By mmengine, which traces."""
    found = {}
    for keep in (1.0, 0.5):
        model = build(name, keep)
        info = get_model_complexity_info(model, SIZE, show_table=False, show_arch=False)
        assert info['params'] == sum(p.numel() for p in model.parameters())
        found[keep] = info['flops']
    assert 0 < found[0.5] < found[1.0]


@pytest.mark.parametrize('name', NAMES[:5])
@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
def test_an_exported_program_is_right_or_refuses(name, dynamic):
    model = build(name, 0.5)
    shapes = {'x': {0: torch.export.Dim('batch', min=1, max=8)}} if dynamic else None
    program = torch.export.export(model, (images(2, 0),), dynamic_shapes=shapes, strict=False)
    run = program.module()
    with torch.no_grad():
        for batch in (1, 2, 3):
            if batch == 2 or dynamic:
                assert_same(run(images(batch)), model(images(batch)))
            else:
                with pytest.raises((AssertionError, RuntimeError), match=r'size|shape|Guard'):
                    run(images(batch))


@FAMILIES
def test_whoever_walks_over_attributes_before_the_first_forward_pass(name):
    model = build(name, 0.5)
    assert dict(inspect.getmembers(model))['keep_masks'] == []
    assert all(hasattr(model, attribute) for attribute in dir(model))
    for walk in (copy.copy, copy.deepcopy):
        other = walk(build(name, 0.5))
        with torch.no_grad():
            assert_same(other(images(1)), model(images(1)), 0.0)
