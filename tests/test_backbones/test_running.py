"""Mixed precision, compilation, copying, and running with neither mmdet nor mmseg."""

import copy
import pickle
import subprocess
import sys
import textwrap
from itertools import cycle
from pathlib import Path

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    SCORERS,
    assert_close,
    image,
    kept,
    parametrize,
    randomize,
    variant_scopes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SCOPES = variant_scopes(FAMILIES)


def build(variant, scope='map', scorer='mean_distance', keep=0.5, **kwargs):
    policy = dict(scorer=scorer, scope=scope)
    return randomize(variant.build(keep_ratios=keep, policy=policy, **kwargs)).eval()


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_autocast(variant, scope):
    # Each precision with each ratio over the scopes of Swin; one pair in each other family.
    pairs = ((torch.bfloat16, 1.0), (torch.float16, 0.5))
    for dtype, keep in pairs if scope != 'window_tokens' else ((torch.bfloat16, 0.5),):
        assert_runs_under_autocast(variant, scope, dtype, keep)
    if variant.name == 'swin' and scope == 'map':
        assert_runs_under_autocast(variant, scope, torch.float16, 1.0)


def assert_runs_under_autocast(variant, scope, dtype, keep):
    model = build(variant, scope, keep=keep, drop_path_rate=0.0).train()
    x = image((2, 3, 45, 58))
    plain = model(x)
    plain_masks = model.keep_masks
    with torch.autocast('cpu', dtype):
        outs = model(x)
    sum(out.float().square().mean() for out in outs).backward()
    for a, b in zip(outs, plain, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all()
    for stage, plain_stage in zip(model.keep_masks, plain_masks, strict=True):
        for a, b in zip(stage, plain_stage, strict=True):
            assert a.shape == b.shape
            assert int(a.sum()) == int(b.sum())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    if keep == 1.0:
        assert_close(outs[0].float(), plain[0], 0.1)


@pytest.mark.parametrize(
    ('variant', 'scorer'),
    list(zip(FAMILIES, cycle(SCORERS), strict=False)),
    ids=lambda value: getattr(value, 'name', value),
)
def test_autocast_with_large_values(variant, scorer):
    """Scores are computed in float32: squares of large features do not overflow."""
    model = build(variant, scorer=scorer)
    with torch.no_grad(), torch.autocast('cpu', torch.float16):
        outs = model(200 * image((1, 3, 45, 58)))
    assert all(out.isfinite().all() for out in outs)
    assert int(model.keep_masks[0][0].sum()) == kept(0.5, model.keep_masks[0][0].numel())


@parametrize()
def test_whole_model_in_another_precision(variant):
    for dtype, keep in ((torch.bfloat16, 0.5), (torch.float16, 1.0)):
        model = build(variant, keep=keep).to(dtype)
        outs = model(image((1, 3, 29, 38), dtype=dtype))
        assert all(out.dtype == dtype and out.isfinite().all() for out in outs)


@parametrize()
def test_nothing_becomes_nan_on_flat_images(variant):
    """An even image: every token scores the same."""
    for scorer in ('mean_distance', 'activation_norm', 'mean_query'):
        model = build(variant, scorer=scorer).train()
        outs = model(torch.zeros(2, 3, 21, 30))
        sum(out.sum() for out in outs).backward()
        assert all(out.isfinite().all() for out in outs)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        mask = model.keep_masks[0][0]
        assert mask.flatten(1).sum(1).tolist() == [kept(0.5, mask[0].numel())] * 2


# Two blocks: compilation takes seconds.
SHALLOW = {
    'swin': dict(depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,)),
    'mit': dict(
        num_stages=1,
        num_layers=[2],
        num_heads=[1],
        patch_sizes=[4],
        strides=[4],
        sr_ratios=[2],
        out_indices=(0,),
    ),
}


# Plain ViTs, policies and training: tests/test_policies/test_policies.py
@pytest.mark.parametrize('name', SHALLOW)
def test_compiled_backbone(name):
    """Compiled first, so that what compilation caches is then used without it."""
    torch._dynamo.reset()
    model = build(BY_NAME[name], **SHALLOW[name])
    compiled = torch.compile(model, backend='aot_eager')
    with torch.no_grad():
        for size in ((1, 3, 46, 61), (2, 3, 53, 47)):
            got, masks = compiled(image(size)), model.keep_masks
            want = model(image(size))
            for a, b in zip(got, want, strict=True):
                assert_close(a, b, 1e-5)
            for stage, want_stage in zip(masks, model.keep_masks, strict=True):
                for a, b in zip(stage, want_stage, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize(('name', 'way'), [('swin', 'deepcopy'), ('vit', 'pickle')])
def test_copies_after_a_training_forward(name, way):
    """Averaged models are deep copies; a graph held by the model would forbid them."""
    model = build(BY_NAME[name]).train()
    x = image((1, 3, 45, 58))
    sum(out.sum() for out in model(x)).backward()
    model(x)
    twin = copy.deepcopy(model) if way == 'deepcopy' else pickle.loads(pickle.dumps(model))
    assert twin.keep_ratios == model.keep_ratios
    model.eval()
    twin.eval()
    with torch.no_grad():
        want = model(x)
        got = twin(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        twin.set_keep_ratios(0.25)
        assert model.keep_ratios[0][0] == 0.5
        assert all(torch.equal(a, b) for a, b in zip(model(x), want, strict=True))


@parametrize()
def test_masks_do_not_hold_the_graph(variant):
    model = build(variant).train()
    model(image((1, 3, 45, 58)))
    assert all(m.grad_fn is None for stage in model.keep_masks for m in stage)


def test_masks_lie_on_the_device_of_the_model():
    for variant in FAMILIES:
        model = build(variant, keep=[[1.0] + [0.5] * (d - 1) for d in variant.depths]).to('meta')
        outs = model(torch.empty(1, 3, 45, 58, device='meta'))
        assert {out.device.type for out in outs} == {'meta'}
        want = build(variant)(image((1, 3, 45, 58)))
        assert [out.shape for out in outs] == [out.shape for out in want]
        assert {m.device.type for stage in model.keep_masks for m in stage} == {'meta'}


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
@given(height=st.integers(1, 70), width=st.integers(1, 70), keep=st.sampled_from([1.0, 0.6, 1e-4]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_image_size(variant, scope, height, width, keep):
    """Images smaller than a patch included, which mmdet's PVT refuses."""
    model = build(variant, scope, keep=keep)
    with torch.no_grad():
        outs = model(image((2, 3, height, width)))
    assert outs[0].shape[-2:] == model.keep_masks[0][0].shape[-2:]
    assert outs[0].shape[-2:] == (tokens_along(height, variant), tokens_along(width, variant))
    assert all(out.isfinite().all() for out in outs)


def tokens_along(pixels, variant):
    """Tokens of the first stage along an axis; PVT drops pixels that fill no patch."""
    return (
        max(1, pixels // 4) if variant.type == 'IdlePyramidVisionTransformer' else -(-pixels // 4)
    )


@parametrize()
def test_images_are_not_changed(variant):
    model = build(variant)
    x = image((1, 3, 45, 58))
    before = x.clone()
    model(x)
    assert torch.equal(x, before)


@parametrize()
def test_channels_last_and_non_contiguous_images(variant):
    model = build(variant)
    x = image((2, 3, 45, 58))
    with torch.no_grad():
        want = model(x)
        for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            for a, b in zip(model(other), want, strict=True):
                assert_close(a, b, 1e-4)


@parametrize()
def test_inference_mode_then_training(variant):
    """Tables cached under inference mode must serve training."""
    model = build(variant)
    x = image((1, 3, 45, 58))
    with torch.inference_mode():
        model(x)
    sum(out.sum() for out in model.train()(x)).backward()


def test_runs_without_what_it_can_do_without():
    """As on a machine with mmcv-lite alone; OpenMMLab brings neither safetensors nor timm."""
    script = """
        import sys
        for name in ('mmdet', 'mmseg', 'mmcv.ops', 'mmcv._ext', 'safetensors', 'timm'):
            sys.modules[name] = None
        sys.path.insert(0, {tests!r})
        import torch
        from backbone_zoo import FAMILIES, image, randomize
        for variant in FAMILIES:
            for scope in variant.scopes:
                for keep in (1.0, 0.5):
                    model = randomize(variant.build(keep_ratios=keep, policy=dict(scope=scope)))
                    outs = model(image((1, 3, 45, 58)))
                    sum(out.sum() for out in outs).backward()
                    assert all(out.isfinite().all() for out in outs)
        loaded = [n for n in sys.modules if n.split('.')[0] in ('mmdet', 'mmseg')]
        assert loaded == ['mmdet', 'mmseg'], loaded
        print('ran', len(FAMILIES))
    """
    script = textwrap.dedent(script).format(tests=str(Path(__file__).parents[1]))
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith(f'ran {len(FAMILIES)}')


def test_stride_of_the_patch_embedding_must_equal_its_size():
    with pytest.raises((ValueError, AssertionError, TypeError)):
        BY_NAME['swin'].build(strides=(2, 2))  # must equal patch_size=4
