"""State-dict keys are mmdet's, and checkpoints of all usual kinds load."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    VARIANTS,
    assert_close,
    image,
    load_twin,
    parametrize,
    randomize,
)
from mmengine.registry import MODELS

from idlevit_mm.errors import SettingError

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
    ours, _, kwargs = FULL_SIZE[name]
    golden = json.loads((GOLDEN / f'{name}.json').read_text())
    assert shapes(MODELS.build(dict(type=ours, **kwargs))) == golden


@pytest.mark.parametrize('name', FULL_SIZE)
def test_pinned_keys_are_those_of_the_twin(name):
    _, theirs, kwargs = FULL_SIZE[name]
    library = 'mmseg' if theirs in ('VisionTransformer', 'MixVisionTransformer') else 'mmdet'
    backbones = pytest.importorskip(f'{library}.models.backbones')
    golden = json.loads((GOLDEN / f'{name}.json').read_text())
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
    load_twin(twin, model.state_dict())
    for key, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@parametrize()
def test_nothing_of_a_forward_enters_the_state_dict(variant):
    model = randomize(variant.build(keep_ratios=0.5))
    before = shapes(model)
    model(image(variant.sizes[0]))
    assert shapes(model) == before


# --- loading files ---------------------------------------------------------------------------


def pretrained(variant, path, **overrides):
    """Our model, initialised from a file the way a config does it."""
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = variant.build(init_cfg=init_cfg, **overrides)
    randomize(model, 99)
    model.init_weights()
    return model


def pretrained_twin(variant, path, **overrides):
    from mmengine.config import ConfigDict

    # mmdet's Swin reads init_cfg by attribute, as it comes from a config file.
    init_cfg = ConfigDict(type='Pretrained', checkpoint=str(path))
    twin = variant.build_twin(init_cfg=init_cfg, **overrides)
    randomize(twin, 99)
    twin.init_weights()
    return twin


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


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_pretrained_however_it_is_wrapped(wrapping, tmp_path):
    variant = BY_NAME['swin']
    state = randomize(variant.build(), 5).state_dict()
    path = save(tmp_path / 'dense.pth', WRAPPINGS[wrapping](dict(state)))
    for convert in (False, True):
        assert_holds(pretrained(variant, path, keep_ratios=0.5, convert_weights=convert), state)


@parametrize()
def test_conversion_leaves_our_own_keys_alone(variant, tmp_path):
    """convert_weights is True by default in mmdet's PVT, and files of mmdet's keys pass it."""
    state = randomize(variant.build(), 5).state_dict()
    path = save(tmp_path / 'dense.pth', WRAPPINGS['detector'](dict(state)))
    for convert in ({}, dict(convert_weights=False), dict(convert_weights=True)):
        assert_holds(pretrained(variant, path, keep_ratios=0.5, **convert), state)


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


@parametrize()
def test_file_of_another_network_is_refused(variant, tmp_path):
    """Nothing fits: an error that says what the file holds, instead of training from noise."""
    path = save(tmp_path / 'other.pth', {'conv1.weight': torch.ones(3), 'fc.bias': torch.ones(2)})
    for convert in (False, True):
        with pytest.raises((ValueError, RuntimeError, KeyError), match=r'conv1\.weight'):
            pretrained(variant, path, convert_weights=convert)


# --- official releases ------------------------------------------------------------------------


def unfold_to_concat(x):
    """Channel order of mmdet's patch merging (C, row, column) to the release's (column, row, C)."""
    lead, size = x.shape[:-1], x.shape[-1]
    x = x.reshape(*lead, size // 4, 2, 2)
    order = list(range(len(lead))) + [len(lead) + 2, len(lead) + 1, len(lead)]
    return x.permute(order).reshape(*lead, size)


def official_swin(state):
    """State dict named and ordered as in the Swin authors' releases."""
    released = {}
    for key, value in state.items():
        new = key.replace('attn.w_msa.', 'attn.')
        new = new.replace('ffn.layers.0.0.', 'mlp.fc1.').replace('ffn.layers.1.', 'mlp.fc2.')
        if key.startswith('stages.'):
            new = new.replace('stages.', 'layers.', 1)
        new = new.replace('patch_embed.projection', 'patch_embed.proj')
        if '.downsample.' in key:
            value = unfold_to_concat(value)
        if not key.startswith('norm'):  # releases hold one last norm of the classifier
            released[new] = value
    last = max(int(k.split('.')[1]) for k in state if k.startswith('stages.'))
    width = state[f'stages.{last}.blocks.0.norm1.weight'].shape[0]
    released['norm.weight'] = torch.ones(width)
    released['norm.bias'] = torch.zeros(width)
    released['head.weight'] = torch.zeros(10, width)
    released['head.bias'] = torch.zeros(10)
    released['layers.0.blocks.1.attn_mask'] = torch.zeros(4, 16, 16)
    return released


def official_pvt(state, with_abs, with_conv, with_norm):
    """State dict named as by the PVT and SegFormer authors (``layers.1.1.3`` is ``block2.2``)."""
    released = {}
    for key, value in state.items():
        _, stage, part, *rest = key.split('.')
        stage = int(stage) + 1
        if part == '0':
            new = f'patch_embed{stage}.' + '.'.join(rest).replace('projection', 'proj')
        elif part == '2':
            new = f'norm{stage}.' + '.'.join(rest)
        elif rest[-1] == 'pos_embed':
            new = f'pos_embed{stage}'
            if value.shape[1] == 49:  # the last stage of a release also has a class token
                value = torch.cat([torch.ones_like(value[:, :1]), value], dim=1)
        else:
            index, tail = int(rest[0]) - with_abs, '.'.join(rest[1:])
            new = f'block{stage}.{index}.{tail}'
            new = new.replace('attn.attn.out_proj', 'attn.proj')
            new = new.replace('ffn.layers.0', 'mlp.fc1').replace(
                'ffn.layers.4' if with_conv else 'ffn.layers.3', 'mlp.fc2'
            )
            new = new.replace('ffn.layers.1', 'mlp.dwconv.dwconv')
            if 'mlp.fc' in new and value.ndim == 4:
                value = value[:, :, 0, 0]
            if 'attn.attn.in_proj_' in new:
                width = value.shape[0] // 3
                released[new.replace('attn.attn.in_proj_', 'attn.q.')] = value[:width]
                released[new.replace('attn.attn.in_proj_', 'attn.kv.')] = value[width:]
                continue
        released[new] = value
    if not with_norm:
        released['norm.weight'] = torch.ones(3)
        released['norm.bias'] = torch.ones(3)
        released['cls_token'] = torch.ones(1, 1, 3)
    released['head.weight'] = torch.ones(3, 3)
    released['head.bias'] = torch.ones(3)
    return released


@pytest.mark.parametrize('wrap', ['model', 'plain'])
@pytest.mark.parametrize('name', ['swin', 'swin-w7', 'swin-plain'])
def test_official_swin_release(name, wrap, tmp_path):
    variant = BY_NAME[name]
    state = randomize(variant.build(), 5).state_dict()
    path = save(tmp_path / 'swin.pth', WRAPPINGS[wrap](official_swin(state)))
    model = pretrained(variant, path, convert_weights=True, keep_ratios=0.5)
    for key, value in model.state_dict().items():
        if not key.startswith('norm'):
            assert torch.equal(value, state[key]), key
    twin = pretrained_twin(variant, path, convert_weights=True)
    assert_holds(model, twin.state_dict())


def test_official_swin_release_with_absolute_position_embedding(tmp_path):
    """mmdet's class cannot read this file; ours can."""
    variant = BY_NAME['swin']
    options = dict(use_abs_pos_embed=True, pretrain_img_size=32)
    state = randomize(variant.build(**options), 5).state_dict()
    path = save(tmp_path / 'swin.pth', dict(model=official_swin(state)))
    model = pretrained(variant, path, convert_weights=True, **options)
    assert torch.equal(model.absolute_pos_embed, state['absolute_pos_embed'])
    key = 'stages.0.downsample.reduction.weight'
    assert torch.equal(model.state_dict()[key], state[key])


@pytest.mark.parametrize('name', ['pvt', 'pvt-no-abs', 'pvtv2'])
@pytest.mark.parametrize('wrap', ['state_dict', 'plain'])
def test_official_pvt_release(name, wrap, tmp_path):
    variant = BY_NAME[name]
    overrides = dict(qkv_bias=True)
    state = randomize(variant.build(**overrides), 5).state_dict()
    released = official_pvt(
        state, with_abs=name == 'pvt', with_conv=name == 'pvtv2', with_norm=name == 'pvtv2'
    )
    path = save(tmp_path / 'pvt.pth', WRAPPINGS[wrap](released))
    model = pretrained(variant, path, keep_ratios=0.5, **overrides)
    assert_holds(model, state)
    assert_holds(model, pretrained_twin(variant, path, **overrides).state_dict())


def test_official_pvt_release_with_class_token(tmp_path):
    """The last position embedding of a release has a row for the class token first."""
    variant = BY_NAME['pvt']
    options = dict(
        num_stages=4,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        patch_sizes=[4, 2, 2, 2],
        strides=[4, 2, 2, 2],
        paddings=[0, 0, 0, 0],
        sr_ratios=[2, 1, 1, 1],
        mlp_ratios=[1, 1, 1, 1],
        pretrain_img_size=224,
        out_indices=(3,),
    )
    state = randomize(variant.build(**options), 5).state_dict()
    released = official_pvt(state, with_abs=True, with_conv=False, with_norm=False)
    assert released['pos_embed4'].shape[1] == 50
    path = save(tmp_path / 'pvt.pth', released)
    model = pretrained(variant, path, **options)
    assert_holds(model, state)
    assert_holds(model, pretrained_twin(variant, path, **options).state_dict())


@pytest.mark.parametrize('wrap', ['state_dict', 'plain'])
def test_official_segformer_release(wrap, tmp_path):
    variant = BY_NAME['mit']
    state = randomize(variant.build(), 5).state_dict()
    released = official_pvt(state, with_abs=False, with_conv=True, with_norm=True)
    path = save(tmp_path / 'mit.pth', WRAPPINGS[wrap](released))
    assert_holds(pretrained(variant, path, keep_ratios=0.5, convert_weights=True), state)
    with pytest.raises(SettingError, match=r'convert_weights=True'):
        pretrained(variant, path)
    mmseg = pytest.importorskip('mmseg')
    tool = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'model_converters' / 'mit2mmseg.py'
    theirs = runpy.run_path(str(tool))['convert_mit'](released)
    assert theirs.keys() == state.keys()
    for key, value in theirs.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize('window', [3, 6])
def test_bias_table_of_another_window_is_resized_as_in_mmdet(window, tmp_path):
    variant = BY_NAME['swin']
    state = dict(randomize(variant.build(), 5).state_dict())
    # The index depends on the window and would not fit; official files of other windows drop it.
    state = {k: v for k, v in state.items() if 'relative_position_index' not in k}
    path = save(tmp_path / 'w4.pth', {f'backbone.{k}': v for k, v in state.items()})
    model = pretrained(variant, path, window_size=window)
    twin = pretrained_twin(variant, path, window_size=window)
    for key, value in twin.state_dict().items():
        assert_close(model.state_dict()[key].float(), value.float(), 1e-6, key)


def test_file_of_another_window_may_hold_the_old_index(tmp_path):
    variant = BY_NAME['swin']
    state = dict(randomize(variant.build(), 5).state_dict())
    path = save(tmp_path / 'w4.pth', dict(state_dict=state))
    model = pretrained(variant, path, window_size=6)
    fresh = variant.build(window_size=6).state_dict()
    key = 'stages.0.blocks.0.attn.w_msa.relative_position_index'
    assert torch.equal(model.state_dict()[key], fresh[key])
    assert model(image((1, 3, 40, 44)))[0].isfinite().all()


def test_absolute_position_embedding_of_another_size_still_loads_the_rest(tmp_path):
    variant = BY_NAME['swin']
    state = randomize(variant.build(use_abs_pos_embed=True, pretrain_img_size=32), 5).state_dict()
    path = save(tmp_path / 'abs.pth', dict(state_dict=dict(state)))
    model = pretrained(variant, path, use_abs_pos_embed=True, pretrain_img_size=48)
    key = 'stages.1.blocks.1.ffn.layers.1.weight'
    assert torch.equal(model.state_dict()[key], state[key])
    assert model.absolute_pos_embed.shape == (1, 144, 8)
    assert model(image((1, 3, 48, 48)))[0].isfinite().all()


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
