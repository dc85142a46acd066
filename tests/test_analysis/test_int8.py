"""Int8 layers of every family: near float, the same tokens but for close scores, and counted."""

import pytest
import torch
from backbone_zoo import BY_NAME, VARIANTS, all_equal, image, parametrize, randomize
from torch import nn

from idlevit_mm.analysis.flops import count_multiply_adds
from idlevit_mm.analysis.int8 import Int8Linear, in_int8
from idlevit_mm.analysis.models import with_keep_ratios


@parametrize(VARIANTS)
def test_near_float(variant):
    for keep in (1.0, 0.5):
        assert_near_float(variant, keep)


def assert_near_float(variant, keep):
    model = randomize(variant.build(drop_path_rate=0.0, keep_ratios=keep)).eval()
    small, images = in_int8(model), image(variant.sizes[0])
    # A token that is exchanged for another one differs altogether; norms after the branches give
    # what is rounded in small ones the size of all.
    limit = (0.05 if keep == 1 else 0.3) * (1.5 if 'swinv2' in variant.name else 1)
    # None of the kernels may read weights that are not there; nothing is left in float.
    left = {type(m) for n, m in small.named_modules() if 'policy' not in n}
    assert not left & {nn.Linear, nn.MultiheadAttention}
    assert any(isinstance(m, Int8Linear) for m in small.modules())
    with torch.no_grad():
        for out, want in zip(small(images), model(images), strict=True):
            assert out.isfinite().all()
            assert (out - want).norm() < limit * want.norm()
            assert not torch.equal(out, want)
    for masks, wants in zip(small.keep_masks, model.keep_masks, strict=True):
        for mask, want in zip(masks, wants, strict=True):
            assert mask.sum() == want.sum()
            assert (mask == want).float().mean() > 0.8


@parametrize()
def test_copies_and_counts(variant):
    model, images = randomize(variant.build()).eval(), image(variant.sizes[0])
    small = in_int8(model)
    # Swin computes the key of padding, which float has as the bias.
    want = pytest.approx(count_multiply_adds(model, images), rel=1e-3)
    assert count_multiply_adds(small, images) == want
    with torch.no_grad():
        for keep in (1.0, 0.5):
            outs = with_keep_ratios(small, keep)(images)
            wants = in_int8(with_keep_ratios(model, keep))(images)
            assert all_equal(outs, wants)


def test_attention_that_a_policy_asks_for():
    model = randomize(BY_NAME['vit'].build(policy=dict(type='EViT'), keep_ratios=0.5)).eval()
    images = image((2, 3, 36, 52))
    with torch.no_grad():
        for out, want in zip(in_int8(model)(images), model(images), strict=True):
            assert (out - want).norm() < 0.25 * want.norm()
