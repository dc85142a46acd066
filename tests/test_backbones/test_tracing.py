"""Traced and exported backbones compute what eager ones do, for other batches too, or refuse."""

import pytest
import torch
from backbone_zoo import BY_NAME, assert_all_close, image, randomize
from mmengine.analysis import get_model_complexity_info

# MiT is PVTv2 with other numbers.
NAMES = ('swin', 'pvt', 'pvtv2', 'svt', 'vit', 'vit-no-cls')
FAMILIES = pytest.mark.parametrize('name', NAMES)
SIZE = (3, 21, 30)

pytestmark = pytest.mark.filterwarnings('ignore')


# Every kind of block once: recording takes long.
FEW = {
    'swin': dict(depths=(2, 1)),
    'swinv2': dict(depths=(2, 1)),
    'pvt': dict(num_layers=[1, 1]),
    'pvtv2': dict(num_layers=[1, 1, 1, 1]),
    'mit': dict(num_layers=[1, 1]),
    'svt': dict(depths=[2, 1]),
    'vit': {},
    'vit-no-cls': dict(num_layers=2, out_indices=(0, 1)),
}


def build(name, keep, **kwargs):
    model = BY_NAME[name].build(keep_ratios=keep, drop_path_rate=0.0, **FEW[name], **kwargs)
    return randomize(model).eval()


def images(batch, seed=1):
    return image((batch, *SIZE), seed)


def assert_same(outs, want, tol=1e-5):
    assert len(outs) == len(want)
    assert_all_close(outs, want, tol)


def traced(model, batch, grad=False):
    with torch.set_grad_enabled(grad):
        return torch.jit.trace(model, images(batch, 0), check_trace=False)


@FAMILIES
def test_a_trace_is_right_for_other_batches(name):
    model = build(name, 1.0)
    assert_traced(model, 1)
    model.set_keep_ratios(0.5)
    for batch, grad in ((1, False), (2, False), (1, True)):
        assert_traced(model, batch, grad)


def assert_traced(model, batch, grad=False):
    graph = traced(model, batch, grad)
    with torch.no_grad():
        for other in (1, 3):
            assert_same(graph(images(other)), model(images(other)))


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
    model = build(name, 1.0, policy=policy)
    # In PVTv2 a stage has one block.
    first = 0.6 if name == 'pvtv2' else 1.0
    model.set_keep_ratios([[first] + [0.6] * (depth - 1) for depth in model.depths])
    for batch in (1, 2):
        assert_traced(model, batch)


@pytest.mark.parametrize('name', ['swin', 'pvt', 'mit', 'vit'])
def test_complexity_is_counted_below_a_ratio_of_one(name):
    """By mmengine, which traces."""
    found = {}
    for keep in (1.0, 0.5):
        model = build(name, keep)
        info = get_model_complexity_info(model, SIZE, show_table=False, show_arch=False)
        assert info['params'] == sum(p.numel() for p in model.parameters())
        found[keep] = info['flops']
    assert 0 < found[0.5] < found[1.0]


# PVT is PVTv2 without the convolution, whose table tests/test_analysis/test_export.py records.
@pytest.mark.parametrize('name', [*(name for name in NAMES if name != 'pvt'), 'swinv2'])
def test_compiled_whole(name):
    """Without a break of the graph, for images of a size that the backbone has not seen."""
    torch.compiler.reset()  # families share code, and what was compiled of it counts
    model = build(name, 0.5)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(images(2)), model(images(2)))
