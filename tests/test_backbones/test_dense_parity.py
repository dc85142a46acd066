"""At ``keep_ratios=1.0`` every backbone equals its dense twin in mmdet and mmseg."""

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    VARIANTS,
    assert_close,
    assert_same_gradients,
    gradients,
    image,
    parametrize,
    randomize,
)

# Variants whose architecture another library has.
WITH_TWIN = tuple(v for v in VARIANTS if v.twins)
CASES = [
    pytest.param(v, size, id=f'{v.name}-{"x".join(map(str, size))}')
    for v in WITH_TWIN
    for size in (v.sizes if v in FAMILIES else v.sizes[:1] + v.sizes[-1:])
]


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
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, tol, f'output {i}')
    assert_same_gradients(got_grads, want_grads, grad_tol or tol)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(model(x), want, strict=True)):
            assert_close(a, b, tol, f'output {i} without gradients')


@pytest.mark.parametrize(('variant', 'size'), CASES)
def test_equals_its_twin_in_float32(variant, size):
    model, twin = pair(variant)
    # Gradients of Swin V2's logit scales are small sums of large numbers: mmpretrain's are off the
    # ones in float64 by 2e-5, as ours.
    grad_tol = 3e-5 if variant.type == 'IdleSwinTransformerV2' else 1e-5
    assert_equal_to_twin(model, twin, image(size), 1e-5, grad_tol)


@parametrize(WITH_TWIN)
def test_equals_its_twin_in_float64(variant):
    model, twin = pair(variant)
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


@parametrize()
def test_explicit_ratio_of_one_is_dense(variant):
    """Every way of writing 1.0, with any scorer, is the dense model."""
    x = image(variant.sizes[0])
    depths = [len(blocks) for blocks in variant.build().keep_ratios]
    for ratios in (1, 1.0, [1.0] * len(depths), [[1.0] * d for d in depths]):
        model, twin = pair(variant, ours=dict(keep_ratios=ratios, policy=dict(scorer='random')))
        for a, b in zip(model(x), twin(x), strict=True):
            assert_close(a, b, 1e-5)
        assert all(mask.all() for stage in model.keep_masks for mask in stage)


@pytest.mark.parametrize('scope', ['map', 'window_tokens', 'windows'])
def test_scope_does_not_matter_when_dense(scope):
    model, twin = pair(BY_NAME['swin'], ours=dict(policy=dict(scope=scope)))
    assert_equal_to_twin(model, twin, image((2, 3, 37, 50)), 1e-5)


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
def test_out_indices(variant):
    for out_indices in ((0,), (1,), [0, 1]):
        model, twin = pair(variant, out_indices=out_indices)
        assert_equal_to_twin(model, twin, image((1, 3, 40, 56)), 1e-5)


@parametrize()
def test_channels_of_the_input(variant):
    model, twin = pair(variant, in_channels=5)
    x = torch.randn(1, 5, 40, 48)
    for a, b in zip(model(x), twin(x), strict=True):
        assert_close(a, b, 1e-5)


@parametrize()
def test_two_sizes_one_after_another(variant):
    """What is cached for one map size must not leak into another."""
    model, twin = pair(variant)
    for size in (variant.sizes[0], variant.sizes[1], variant.sizes[0], (1, 3, 64, 96)):
        x = image(size)
        for a, b in zip(model(x), twin(x), strict=True):
            assert_close(a, b, 1e-5)


@parametrize()
def test_with_cp_gives_the_same_gradients(variant):
    model, twin = pair(variant, ours=dict(with_cp=True), drop_path_rate=0.0)
    # Training mode, for that is when checkpointing is used.
    model.train()
    twin.train()
    assert_equal_to_twin(model, twin, image((2, 3, 41, 56)), 1e-5)


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


# The same code in all three.
@pytest.mark.parametrize(('name', 'frozen_stages'), [('pvt', -1), ('pvt', 2), ('mit', 1)])
def test_frozen_stages_of_pvt(name, frozen_stages):
    """The dense classes have no such argument: n freezes all of the first n stages."""
    model = BY_NAME[name].build(frozen_stages=frozen_stages)
    randomize(model).train()
    _, grads = gradients(model, image((2, 3, 40, 48)))
    frozen = max(0, frozen_stages)
    for i, layer in enumerate(model.layers):
        for part in layer.modules():
            if not list(part.children()):
                assert part.training == (i >= frozen), (i, part)
        for pname, p in layer.named_parameters():
            full = f'layers.{i}.{pname}'
            assert p.requires_grad == (i >= frozen), full
            assert (grads[full] is None) == (i < frozen), full


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 3])
def test_frozen_blocks_of_vit(frozen_stages):
    """mmseg's ViT has no such argument: n freezes the embedding and the first n blocks."""
    model = randomize(BY_NAME['vit'].build(frozen_stages=frozen_stages)).train()
    _, grads = gradients(model, image((2, 3, 40, 48)))
    frozen = {f'layers.{i}' for i in range(frozen_stages)}
    if frozen_stages >= 0:
        frozen |= {'patch_embed', 'pos_embed', 'cls_token'}
    for name, p in model.named_parameters():
        part = '.'.join(name.split('.')[: 2 if name.startswith('layers') else 1])
        assert p.requires_grad == (part not in frozen), name
        assert (grads[name] is None) == (part in frozen), name
    for i, layer in enumerate(model.layers):
        assert all(m.training == (i >= frozen_stages) for m in layer.modules())


@parametrize()
def test_frozen_stage_stays_frozen_through_mode_changes(variant):
    model = variant.build(frozen_stages=variant.frozen_first, drop_path_rate=0.5, drop_rate=0.5)
    assert model.eval() is model
    assert model.train() is model
    first = model.stages[0] if variant.is_swin else model.layers[0]
    assert not any(m.training for m in first.modules())
    last = model.stages[-1] if variant.is_swin else model.layers[-1]
    assert all(m.training for m in last.modules())


@parametrize()
def test_dropout_acts_in_training_only(variant):
    model = randomize(variant.build(drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3))
    x = image((1, 3, 40, 48))
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(model(x), model(x), strict=True))
    model.train()
    assert not all(torch.equal(a, b) for a, b in zip(model(x), model(x), strict=True))


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
