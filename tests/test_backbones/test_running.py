"""Mixed precision, compilation, copying, and running with neither mmdet nor mmseg."""

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
    assert_all_close,
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
def test_images_of_any_layout_are_left_as_they_are(variant):
    """And tables cached under inference mode serve training."""
    model = build(variant)
    x = image((2, 3, 45, 58))
    before = x.clone()
    with torch.inference_mode():
        want = model(x)
        for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            assert_all_close(model(other), want, 1e-4)
    sum(out.sum() for out in model.train()(x)).backward()
    assert torch.equal(x, before)


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
            for keep, scope in ((1.0, 'map'), (0.5, variant.scopes[-1])):
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
