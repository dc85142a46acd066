"""State-dict keys are mmdet's, and checkpoints of all usual kinds load."""

import json
from pathlib import Path

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    VARIANTS,
    image,
    load_twin,
    parametrize,
    randomize,
)
from mmengine.registry import MODELS

GOLDEN = Path(__file__).parents[1] / 'data' / 'state_dict_keys'
FULL_SIZE = {
    'swin_tiny': ('IdleSwinTransformer', 'SwinTransformer', {}),
    'swin_tiny_abs_pos_w12': (
        'IdleSwinTransformer',
        'SwinTransformer',
        dict(use_abs_pos_embed=True, window_size=12, pretrain_img_size=384, patch_norm=False),
    ),
    'pvt_small': ('IdlePyramidVisionTransformer', 'PyramidVisionTransformer', {}),
    'pvtv2_b0': (
        'IdlePyramidVisionTransformerV2',
        'PyramidVisionTransformerV2',
        dict(embed_dims=32, num_layers=[2, 2, 2, 2]),
    ),
    'mit_b0': (
        'IdleMixVisionTransformer',
        'MixVisionTransformer',
        dict(embed_dims=32, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8]),
    ),
    'deit_small': (
        'IdleVisionTransformer',
        'VisionTransformer',
        dict(
            embed_dims=384,
            num_layers=12,
            num_heads=6,
            norm_cfg=dict(type='LN', eps=1e-6),
            patch_bias=True,
            final_norm=True,
        ),
    ),
}


def shapes(model):
    return {key: list(value.shape) for key, value in model.state_dict().items()}


# --- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', FULL_SIZE)
def test_keys_of_full_size_models_are_pinned(name):
    ours, theirs, kwargs = FULL_SIZE[name]
    golden = json.loads((GOLDEN / f'{name}.json').read_text())
    assert shapes(MODELS.build(dict(type=ours, **kwargs))) == golden
    library = 'mmseg' if theirs in ('VisionTransformer', 'MixVisionTransformer') else 'mmdet'
    backbones = pytest.importorskip(f'{library}.models.backbones')
    assert shapes(getattr(backbones, theirs)(**kwargs)) == golden


@parametrize(tuple(v for v in VARIANTS if v.twins))
def test_strict_loading_both_ways(variant):
    twin = randomize(variant.build_twin(), 1)
    model = randomize(variant.build(keep_ratios=0.5), 2)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert shapes(model) == shapes(twin)
    for (name, buffer), (_, theirs) in zip(
        model.named_buffers(), twin.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, theirs), f'{name} is wrong before loading'
    model.load_state_dict(twin.state_dict(), strict=True)
    randomize(model, 3)
    model(image(variant.sizes[0]))
    assert shapes(model) == shapes(twin), 'something of a forward pass is kept'
    load_twin(twin, model.state_dict())
    for key, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


# --- loading files ---------------------------------------------------------------------------


def pretrained(variant, path, **overrides):
    """Our model, initialised from a file the way a config does it."""
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = variant.build(init_cfg=init_cfg, **overrides)
    randomize(model, 99)
    model.init_weights()
    return model


def assert_holds(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def save(path, state):
    torch.save(state, path)
    return path


WRAPPINGS = {
    'plain': lambda s: s,
    'state_dict': lambda s: dict(state_dict=s, meta=dict(epoch=1)),
    'model': lambda s: dict(model=s),
    'detector': lambda s: dict(
        state_dict={
            **{f'backbone.{k}': v for k, v in s.items()},
            'neck.lateral_convs.0.conv.weight': torch.ones(1),
            'bbox_head.fc.bias': torch.ones(1),
        },
        meta={},
    ),
    'parallel': lambda s: dict(state_dict={f'module.{k}': v for k, v in s.items()}),
}


@parametrize()
def test_pretrained_however_it_is_wrapped(variant, tmp_path):
    """convert_weights is True by default in mmdet's PVT, and files of mmdet's keys pass it."""
    state = randomize(variant.build(), 5).state_dict()
    ways = ({}, dict(convert_weights=False), dict(convert_weights=True))
    for wrapping, wrap in WRAPPINGS.items():
        path = save(tmp_path / f'{wrapping}.pth', wrap(dict(state)))
        for convert in ways if wrapping == 'detector' else ways[-1:]:
            assert_holds(pretrained(variant, path, keep_ratios=0.5, **convert), state)
    # Nothing fits: an error that says what the file holds, instead of training from noise.
    path = save(tmp_path / 'other.pth', {'conv1.weight': torch.ones(3), 'fc.bias': torch.ones(2)})
    for convert in ways[1:]:
        with pytest.raises((ValueError, RuntimeError, KeyError), match=r'conv1\.weight'):
            pretrained(variant, path, **convert)


@parametrize()
def test_pretrained_argument(variant, tmp_path):
    """The deprecated ``pretrained=path`` works as ``init_cfg`` does, and excludes it."""
    state = randomize(variant.build(), 5).state_dict()
    path = str(save(tmp_path / 'dense.pth', dict(state_dict=dict(state))))
    with pytest.warns((UserWarning, DeprecationWarning, FutureWarning), match='pretrained'):
        model = variant.build(pretrained=path)
    model.init_weights()
    assert_holds(model, state)
    with pytest.raises((AssertionError, ValueError), match='pretrained'):
        variant.build(pretrained=path, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(TypeError, match='pretrained'):
        variant.build(pretrained=3)


def test_missing_file_is_named(tmp_path):
    for variant in FAMILIES:
        with pytest.raises(FileNotFoundError, match='nothing-here'):
            pretrained(variant, tmp_path / 'nothing-here.pth')


def test_file_of_another_window_may_hold_the_old_index(tmp_path):
    variant = BY_NAME['swin']
    state = dict(randomize(variant.build(), 5).state_dict())
    path = save(tmp_path / 'w4.pth', dict(state_dict=state))
    model = pretrained(variant, path, window_size=6)
    fresh = variant.build(window_size=6).state_dict()
    key = 'stages.0.blocks.0.attn.w_msa.relative_position_index'
    assert torch.equal(model.state_dict()[key], fresh[key])
    assert model(image((1, 3, 40, 44)))[0].isfinite().all()


def test_loading_is_safe(tmp_path):
    """A file that would run code when unpickled is refused."""

    class Payload:
        def __reduce__(self):
            return print, ('this must not run',)

    path = tmp_path / 'payload.pth'
    torch.save({'state_dict': {}, 'meta': Payload()}, path)
    for variant in FAMILIES:
        with pytest.raises(Exception, match=r'(?i)weights.only|unsafe|safe'):
            pretrained(variant, path)
