"""At ``keep_ratios=1.0`` every backbone equals its dense twin in mmdet and mmseg."""

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    VARIANTS,
    assert_all_close,
    assert_same_gradients,
    gradients,
    image,
    parametrize,
    randomize,
)

# Variants whose architecture another library has.
WITH_TWIN = tuple(v for v in VARIANTS if v.twins)


def pair(variant, library=None, ours=None, **overrides):
    """Our model and the dense twin with the same random weights, in evaluation mode."""
    twin = randomize(variant.build_twin(library, **overrides))
    model = variant.build(**{**overrides, **(ours or {})})
    model.load_state_dict(twin.state_dict(), strict=True)
    twin.eval()  # returns None in mmdet
    return model.eval(), twin


def assert_equal_to_twin(model, twin, x, tol, grad_tol=None):
    got, got_grads = gradients(model, x)
    want, want_grads = gradients(twin, x)
    assert len(got) == len(want)
    assert_all_close(got, want, tol)
    assert_same_gradients(got_grads, want_grads, grad_tol or tol)
    with torch.no_grad():
        assert_all_close(model(x), want, tol)


@parametrize(WITH_TWIN)
def test_equals_its_twin(variant):
    """One size after the other: what is cached for one must not leak into another."""
    model, twin = pair(variant)
    # Gradients of Swin V2's logit scales are small sums of large numbers: mmpretrain's are off the
    # ones in float64 by 2e-5, as ours.
    grad_tol = 3e-5 if variant.type == 'IdleSwinTransformerV2' else 1e-5
    for size in variant.sizes if variant in FAMILIES else variant.sizes[:1] + variant.sizes[-1:]:
        assert_equal_to_twin(model, twin, image(size), 1e-5, grad_tol)
    x = image(variant.sizes[0], dtype=torch.float64)
    assert_equal_to_twin(model.double(), twin.double(), x, 1e-11)


@pytest.mark.parametrize('name', [v.name for v in VARIANTS if 'mmseg' in v.twins])
def test_equals_mmseg(name):
    variant = BY_NAME[name]
    model, twin = pair(variant, 'mmseg')
    assert_equal_to_twin(model, twin, image(variant.sizes[0]), 1e-5)


def test_fractional_mlp_ratio_of_mmseg():
    model, twin = pair(BY_NAME['swin'], 'mmseg', mlp_ratio=2.5)
    assert model.stages[1].blocks[0].ffn.layers[0][0].out_features == 40
    assert_equal_to_twin(model, twin, image((1, 3, 33, 21)), 1e-5)


def test_swin_absolute_position_embedding():
    variant = BY_NAME['swin']
    model, twin = pair(variant, use_abs_pos_embed=True, pretrain_img_size=(24, 40))
    assert_equal_to_twin(model, twin, image((2, 3, 24, 40)), 1e-5)


def test_swin_absolute_position_embedding_fits_any_size():
    """mmdet's class fails here; ours resizes the embedding to the map."""
    model = BY_NAME['swin'].build(use_abs_pos_embed=True, pretrain_img_size=32)
    randomize(model).eval()
    outs = model(image((1, 3, 45, 50)))
    assert outs[0].shape == (1, 8, 12, 13)
    assert all(out.isfinite().all() for out in outs)
    with torch.no_grad():
        model.absolute_pos_embed.fill_(0.25)
        constant = model(image((1, 3, 45, 50)))
        model.absolute_pos_embed.zero_()
        none = model(image((1, 3, 45, 50)))
    assert not torch.allclose(constant[0], none[0]), 'the embedding is not used'


@pytest.mark.parametrize('name', ['swin', 'pvt'])
def test_pretrain_size_may_have_one_or_two_numbers(name):
    variant = BY_NAME[name]
    shapes = [
        {k: v.shape for k, v in variant.build(pretrain_img_size=size).state_dict().items()}
        for size in (32, (32,), (32, 32))
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_pvt_position_embedding_of_oblong_pretrain_size():
    model, twin = pair(BY_NAME['pvt'], pretrain_img_size=(32, 64))
    assert_equal_to_twin(model, twin, image((2, 3, 40, 56)), 1e-5)


@parametrize()
def test_outputs_and_channels_of_the_input(variant):
    for options in (
        *(dict(out_indices=out_indices) for out_indices in ((0,), (1,), [0, 1])),
        dict(in_channels=5),
    ):
        model, twin = pair(variant, **options)
        x = torch.randn(1, options.get('in_channels', 3), 40, 56)
        assert_equal_to_twin(model, twin, x, 1e-5)


def frozen_names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2])
def test_frozen_stages_of_swin(frozen_stages):
    variant = BY_NAME['swin']
    model, twin = pair(
        variant,
        frozen_stages=frozen_stages,
        use_abs_pos_embed=True,
        pretrain_img_size=32,
        drop_path_rate=0.0,
    )
    model.train()
    twin.train()
    assert frozen_names(model) == frozen_names(twin)
    modes = {name: m.training for name, m in model.named_modules()}
    for name, m in twin.named_modules():
        if name in modes:
            assert modes[name] == m.training, name
    assert_equal_to_twin(model, twin, image((2, 3, 32, 32)), 1e-5)


@parametrize()
def test_initialisation_from_scratch_follows_the_twin(variant):
    twin = variant.build_twin(**variant.wide(32))
    model = variant.build(**variant.wide(32))
    for m in (twin, model):
        torch.manual_seed(1)
        m.init_weights()
    want = twin.state_dict()
    for key, value in model.state_dict().items():
        if 'bias_table' in key:
            continue  # mmdet leaves the table at zero, the paper draws it at random
        if variant.is_vitdet and not key.startswith(('pos_embed', 'patch_embed')):
            continue  # mmpretrain leaves layers to PyTorch, the paper draws them
        if not value.is_floating_point():
            assert torch.equal(value, want[key])
        elif want[key].numel() > 500:
            ratio = value.std() / want[key].std()
            assert 0.85 < ratio < 1.15, f'{key}: spread {value.std():.4f}, {want[key].std():.4f}'
        elif want[key].min() == want[key].max():
            assert torch.equal(value, want[key]), key
