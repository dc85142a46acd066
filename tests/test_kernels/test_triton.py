"""The kernels of GPUs, in Triton's interpreter: the same tokens and numbers as the reference.

Triton reads from the environment whether it interprets when it is imported, so these tests run in a
process of their own, which this file starts.
"""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from backbone_zoo import assert_close, image, randomize
from mmengine.registry import MODELS
from ranks import run_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from idlevit_mm.analysis.flops import MultiplyAddCounter
from idlevit_mm.blocks import Carried
from idlevit_mm.kernels import Site, Triton, backend_at, kind_of, use
from idlevit_mm.ops import window_units
from idlevit_mm.policies import MeanDistance, unit_scores

if find_spec('triton') is not None:
    from idlevit_mm.kernels.triton import fusions, layers, ops
    from idlevit_mm.kernels.triton.halves import _starts

INSIDE = os.environ.get('TRITON_INTERPRET') == '1'
pytestmark = pytest.mark.skipif(find_spec('triton') is None, reason='triton is not installed')
inside = pytest.mark.skipif(not INSIDE, reason='it runs in the process of test_in_the_interpreter')
outside = pytest.mark.skipif(INSIDE, reason='it needs no interpreter')

SWIN = dict(
    type='IdleSwinTransformer',
    embed_dims=16,
    depths=(2, 1),
    num_heads=(1, 2),
    strides=(4, 2),
    window_size=4,
    out_indices=(0, 1),
)
PYRAMID = dict(
    embed_dims=16,
    num_stages=2,
    num_layers=[2, 1],
    num_heads=[1, 2],
    strides=[4, 2],
    sr_ratios=[2, 1],
    out_indices=(0, 1),
)
PVT = dict(
    PYRAMID,
    type='IdlePyramidVisionTransformer',
    patch_sizes=[4, 2],
    paddings=[0, 0],
    mlp_ratios=[2, 3],
    pretrain_img_size=32,
)
PVT2 = dict(
    type='IdlePyramidVisionTransformerV2',
    embed_dims=16,
    num_layers=[2, 1, 1, 1],
    num_heads=[1, 2, 2, 2],
    # No map of two tokens, whose distances from their mean are equal but for rounding.
    strides=[4, 2, 2, 1],
    sr_ratios=[2, 1, 1, 1],
    mlp_ratios=[2, 3, 2, 2],
)
MIT = dict(PYRAMID, type='IdleMixVisionTransformer', patch_sizes=[7, 3], mlp_ratio=2)
FAMILIES = dict(swin=SWIN, pvt=PVT, pvtv2=PVT2, mit=MIT)
# The same widths and windows; nothing covers its attention.
SWIN2 = {'depths': (2, 1), 'num_heads': (1, 2), 'extra_norm_every_n_blocks': 0, 'embed_dims': 16}
SWIN2 = dict(type='IdleSwinTransformerV2', arch=SWIN2, window_size=4, out_indices=(0, 1))
# Maps of 7 x 5 tokens and fewer: no whole number of windows, cells or tiles.
SIZE = 2, 3, 28, 20


def built(config, **kwargs):
    return randomize(MODELS.build(dict(config, **kwargs))).eval()


@torch.no_grad()
def assert_same(model, x, tolerance=1e-4):
    with use('torch'):
        want, masks = model(x), model.keep_masks
    with use('triton'):
        assert backend_at(x).name == 'triton'
        outs = model(x)
    for stage, others in zip(masks, model.keep_masks, strict=True):
        for mask, other in zip(stage, others, strict=True):
            assert torch.equal(mask, other)
    for out, other in zip(outs, want, strict=True):
        assert_close(out, other, tolerance)


@outside
def test_in_the_interpreter():
    files = __file__, str(Path(__file__).with_name('test_triton_training.py'))
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *files]
    environment = dict(os.environ, TRITON_INTERPRET='1')
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert ' passed' in done.stdout


@inside
@pytest.mark.parametrize('keep', [0.3, 0.5, 1.0])
@pytest.mark.parametrize('family', FAMILIES)
def test_families(family, keep, monkeypatch):
    # Stages own their first map, so that rows are put back in place in all blocks.
    monkeypatch.setattr(ops, 'merge_rows', None)
    assert_same(built(FAMILIES[family], keep_ratios=keep), image(SIZE))


# The most channels for fused norms, and for an MLP or a reduction in one kernel.
_SETS = [(0, 0), (192, 0), (192, 128)]


@inside
@pytest.mark.parametrize(('widest', 'one'), _SETS)
@pytest.mark.parametrize('family', ['swin', 'pvt'])
@torch.no_grad()
def test_sets_of_fusions(family, widest, one, monkeypatch):
    monkeypatch.setattr(fusions, 'WIDEST', widest)
    monkeypatch.setattr(fusions, 'ONE_KERNEL', one)
    # On a map of 9 x 6 the only cell is not full.
    config = dict(PVT, sr_ratios=[8, 1]) if family == 'pvt' else SWIN
    model, x = built(config, keep_ratios=0.5), image(SIZE)
    if one == 0 or family == 'pvt':
        assert_same(model, x)
    # And the mean that scores need is kept, whichever kernel changes rows.
    block = model.stages[0].blocks[1] if family == 'swin' else model.layers[0][1][-1]
    tokens = torch.randn(2, 54, 16) + 1.0
    with use('triton'):
        out, carried = block(tokens, (9, 6), 0.5, Carried(owned=True))
    assert out is tokens
    mean, changes = carried.centre
    assert changes.any()
    assert_close(mean + changes / 2**24 / 54, out.mean(1), 1e-5)


@inside
@pytest.mark.parametrize('family', ['swin', 'pvt'])
@torch.no_grad()
def test_dropout_takes_the_modules(family, monkeypatch):
    monkeypatch.setattr(layers, 'add_branch', None)
    with use('triton'):
        built(FAMILIES[family], keep_ratios=0.5, drop_path_rate=0.5).train()(image(SIZE))


@inside
@pytest.mark.parametrize(
    ('config', 'policy'),
    [
        (dict(SWIN, depths=(1, 1)), dict(scorer='mean_distance')),
        (dict(PVT, num_layers=[1, 1]), dict(scorer='activation_norm')),
        (dict(SWIN, depths=(1, 1)), dict(scope='window_tokens')),
    ],
)
def test_padding_of_images(config, policy):
    x = image(SIZE)
    x[0, :, 20:], x[1, :, :, 17:] = 0, 0
    model = built(config, keep_ratios=0.5, policy=policy)
    assert_same(model, x)
    if 'scope' not in policy:
        assert not model.keep_masks[0][0][0, 5:, :].any()


@inside
@pytest.mark.parametrize(('scope', 'keep'), [('window_tokens', 0.3), ('windows', 0.5)])
def test_scopes(scope, keep):
    assert_same(built(SWIN, keep_ratios=keep, policy=dict(scope=scope)), image(SIZE))


@inside
@pytest.mark.parametrize(
    'policy',
    [
        dict(scorer='activation_norm'),
        dict(scorer='mean_query'),
        dict(scorer='learned'),
        dict(context='all'),
        dict(context='summary'),
    ],
    ids=lambda policy: next(iter(policy.values())),
)
@pytest.mark.parametrize('family', ['swin', 'pvtv2'])
def test_what_is_not_covered_goes_through_the_modules(family, policy):
    assert_same(built(FAMILIES[family], keep_ratios=0.5, policy=policy), image(SIZE))


@inside
@pytest.mark.parametrize('keep', [0.5, 1.0])
def test_swin_v2_never_has_the_attention_of_swin(keep, monkeypatch):
    monkeypatch.setattr(ops, 'window_attention', None)
    assert_same(built(SWIN2, keep_ratios=keep), image(SIZE))


@inside
@pytest.mark.parametrize('config', [dict(window_size=7), dict(qkv_bias=False, depths=(2,))])
def test_windows(config):
    config = dict(config, strides=(4,), out_indices=(0,), num_heads=(1,))
    config.setdefault('depths', (2,))
    for size in ((1, 3, 36, 52), (2, 3, 4, 40)):
        assert_same(built(SWIN, keep_ratios=0.5, **config), image(size))


@inside
@pytest.mark.parametrize('family', FAMILIES)
def test_multiply_adds_are_counted(family):
    """At 1.0 those of the reference; below it no slots of idle tokens."""
    counted = {}
    for keep in (1.0, 0.5):
        model = built(FAMILIES[family], keep_ratios=keep)
        for backend in ('triton', 'reference'):
            counter = MultiplyAddCounter()
            with torch.no_grad(), use(backend), counter:
                model(image((1, 3, 32, 32)))
            counted[keep, backend] = counter.multiply_adds
    assert counted[1.0, 'triton'] == pytest.approx(counted[1.0, 'reference'], rel=0.01)
    assert counted[0.5, 'triton'] < 0.75 * counted[1.0, 'triton']
    assert counted[0.5, 'triton'] <= 1.01 * counted[0.5, 'reference']


@inside
@pytest.mark.parametrize('kind', ['LayerNorm', 'Linear', 'Conv2d', 'GELU', 'Dropout'])
def test_hooked_layers_are_called(kind):
    one = {key: value[:1] for key, value in PVT.items() if type(value) is list}
    one |= dict(num_stages=1, out_indices=(0,), use_conv_ffn=True)
    swin = dict(SWIN, depths=(1,), num_heads=(1,), strides=(4,), out_indices=(0,))
    for config in (swin, dict(PVT, **one)):
        model = built(config, keep_ratios=0.5)
        hooked = [m for m in model.modules() if isinstance(m, getattr(nn, kind))]
        for module in hooked:
            # Not a factor, which the next norm takes back.
            module.register_forward_hook(lambda *args: args[2].sin())
        assert hooked
        assert_same(model, image(SIZE))


@inside
def test_more_tokens_than_can_be_counted(monkeypatch):
    monkeypatch.setattr(ops, 'MOST_TOKENS', 34)
    monkeypatch.setattr(ops, 'select', None)
    one_stage = dict(depths=(1,), num_heads=(1,), strides=(4,), out_indices=(0,))
    assert_same(built(SWIN | one_stage, keep_ratios=0.5), image(SIZE))


@inside
@pytest.mark.parametrize('policy', [dict(context='summary'), dict(type='EViT')], ids=str)
def test_images_share_ids_of_rows(policy):
    """Without padding in windows the rows that summaries are made of are one expanded tensor."""
    assert_same(built(SWIN, keep_ratios=0.5, policy=policy), image((2, 3, 32, 32)))


@inside
def test_replaced_layers_of_known_classes():
    class Transposed(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)

    swin, mit = built(SWIN, keep_ratios=0.5), built(MIT, keep_ratios=0.5)
    for block in swin.stages[0].blocks:
        block.attn.w_msa.proj = Transposed(16, 16)
    for block in mit.layers[0][1]:
        block.ffn.layers[1] = nn.Conv2d(32, 32, 5, padding=2, groups=32)
    for model in (swin, mit):
        assert_same(randomize(model).eval(), image(SIZE))


@inside
@pytest.mark.parametrize(('window', 'shift'), [(4, 0), (4, 2), (8, 0)])
@pytest.mark.parametrize('count', [1, 2, 20, 53, 54])
def test_of_equal_scores_the_first_are_chosen(window, shift, count):
    negative = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
    assert math.isnan(negative)
    for low, high, best in ((0.0, 1.0, negative), (1.0, math.inf, math.nan), (1.0, 1.0, 1.0)):
        scores = torch.full((2, 54), low)
        scores[0, 3::4] = scores[1, 5:50] = high
        scores[:, 17] = best
        ids, offsets, places = ops.select(scores, count, (9, 6), window, shift, None)
        want = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(ids.sort(dim=1).values, want.sort(dim=1).values)
        rows = torch.arange(2 * count, dtype=torch.int32).view(2, -1)
        assert torch.equal(places.gather(1, ids), rows)
        assert (places >= 0).sum() == offsets[-1] == 2 * count


@inside
@pytest.mark.parametrize('window', [4, 33])
def test_choice_in_windows(window):
    hw_shape = 5, 34
    scores = torch.rand(2, 170)
    counts = 0, *(max(1, number // 2) for number in range(1, window**2 + 1))
    starts = _starts(hw_shape, window, 0, counts, scores.device)
    ids, offsets, _ = ops.select(scores, starts.total, hw_shape, window, 0, starts.places)
    units = window_units(*hw_shape, window, 0, False, scores.device)
    kept = tuple(counts[number] for number in units.valid)
    slots = backend_at(scores).best(unit_scores(scores, units), kept)
    want = units.token_ids.flatten()[slots]
    assert torch.equal(ids.sort(dim=1).values, want.sort(dim=1).values)
    assert offsets[-1] == 2 * starts.total


@inside
def test_idle_rows_stay_bit_identical():
    x, now = torch.full((1, 4, 16), -0.0), torch.ones(1, 2, 16)
    places = torch.tensor([[0, -1, -1, 1]], dtype=torch.int32)
    out = ops.merge_rows(x, places, now, now)
    assert torch.equal(out[:, 1:3].view(torch.int32), x[:, 1:3].view(torch.int32))
    assert (out[:, ::3] == 2).all()


@inside
def test_equal_scores_keep_so_many():
    model = built(SWIN, keep_ratios=0.5)
    with torch.no_grad(), use('triton'):
        model(torch.zeros(SIZE))
    for mask in model.keep_masks[0]:
        assert mask.flatten(1).sum(1).tolist() == [18, 18]


@inside
@torch.no_grad()
@pytest.mark.parametrize('family', ['swin', 'pvt'])
def test_what_others_hold_is_not_written_to(family):
    model, held = built(FAMILIES[family], keep_ratios=[[0.5] * 2, [0.5]]), []
    blocks = model.stages[0].blocks if family == 'swin' else model.layers[0][1][-2:]
    x = torch.randn(2, 54, 16)
    before = x.clone()
    with use('triton'):
        out, carried = blocks[0](x, (9, 6), 0.5)
        assert carried.owned
        assert torch.equal(x, before)
        # What the next block has been given for its own it may use.
        again = blocks[1](out.clone(), (9, 6), 0.5)[0]
        assert torch.equal(blocks[1](out, (9, 6), 0.5, carried)[0], again)
        assert torch.equal(out, again)
        blocks[1].norm1.register_forward_pre_hook(
            lambda _, args: held.append((args[0], args[0].clone()))
        )
        maker = model.patch_embed if family == 'swin' else model.layers[0][1][0]
        for layer in (maker, blocks[0]):
            layer.register_forward_hook(lambda *args: held.append((args[2][0], args[2][0].clone())))
            model(image(SIZE))
    assert len(held) == 2 * 2 + 1
    for one, copy in held:
        assert torch.equal(one, copy)


@inside
def test_half_precision_of_norms_and_moves():
    model = built(PVT, keep_ratios=0.5).half()
    x = image(SIZE).half()
    with torch.no_grad(), use('triton'):
        outs = model(x)
    assert all(out.isfinite().all() for out in outs)


@inside
def test_compiled_whole():
    torch._dynamo.reset()
    model = built(SWIN, keep_ratios=0.5)
    x = image(SIZE)
    with torch.no_grad(), use('triton'):
        want = model(x)
        got = torch.compile(model, backend='aot_eager', fullgraph=True)(x)
    for out, other in zip(got, want, strict=True):
        assert_close(out, other, 1e-6)


# What needs no interpreter


@outside
def test_fake_tensors_pass_through(tmp_path):
    # In a process of its own: parameters on a GPU start threads of autograd; no fork survives them.

    run_ranks(tmp_path, _pass_fake_tensors, world=1)


def _pass_fake_tensors(rank):
    for family in FAMILIES:
        _pass_fake_tensors_of(family)


def _pass_fake_tensors_of(family):
    model = built(FAMILIES[family], keep_ratios=0.5)
    want = [out.shape for out in model(image(SIZE))]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    new = torch.empty(value.shape, device='cuda', dtype=torch.bfloat16)
                    module._parameters[name] = nn.Parameter(new, requires_grad=False)
        x = torch.empty(SIZE, device='cuda', dtype=torch.bfloat16)
        assert backend_at(x).name == 'triton'
        assert [out.shape for out in model(x)] == want


@outside
def test_kinds_are_classes_of_this_package():
    others = type('MeanDistance', (MeanDistance,), dict(__module__='somewhere'))
    assert kind_of(MeanDistance(4)) == 'MeanDistance'
    assert kind_of(others(4)) == kind_of(nn.Linear(1, 1)) == ''


@outside
def test_why_not_in_words():
    site = Site('cuda', torch.float16, eager=True, traced=False, grad=False, autocast=False)
    for changes, word in (
        (dict(traced=True), 'graph'),
        (dict(dtype=torch.float32), 'float32'),
        (dict(device='cpu'), 'lie on cpu'),
    ):
        assert word in Triton().why_not(site._replace(**changes))
    for changes in (dict(grad=True), dict(grad=True, autocast=True, dtype=torch.float32)):
        assert not Triton().why_not(site._replace(**changes))
    with use('triton'):
        assert 'TRITON_INTERPRET' in Triton().why_not(site._replace(device='cpu'))
