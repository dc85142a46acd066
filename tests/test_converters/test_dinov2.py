"""DINOv2's weights by the names of timm, its release and Hugging Face: same features as timm's."""

import pytest
import torch
from backbone_zoo import assert_close, image, randomize
from mmengine.registry import MODELS
from torch import Tensor

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.backbones.vit_shapes import ARCHS
from idlevit_mm.converters import convert_weights, detect
from idlevit_mm.errors import SettingError

timm = pytest.importorskip('timm')

NAMES = {0: 'vit_small_patch14_dinov2', 4: 'vit_small_patch14_reg4_dinov2'}
SIDE = 70
# Sides in pixels: as many patches, more and fewer, wide and tall.
SIZES = ((SIDE, SIDE), (42, 126), (28, 14), (154, 98))
each_number = pytest.mark.parametrize('registers', NAMES)


def timm_model(registers, **kwargs):
    options = dict(depth=3, embed_dim=24, num_heads=3, img_size=SIDE, num_classes=0, **kwargs)
    model = timm.create_model(NAMES[registers], dynamic_img_size=True, **options)
    return randomize(model).double().eval()


def idle_vit(registers, **kwargs):
    options = dict(num_layers=3, embed_dims=24, num_heads=3, num_registers=registers)
    options |= dict(arch='dinov2-small', img_size=SIDE, output_cls_token=True)
    return MODELS.build(dict(type='IdleVisionTransformer', **options | kwargs)).double().eval()


@torch.no_grad()
def assert_same_features(ours, theirs, registers, size):
    x = image((2, 3, *size), dtype=torch.float64)
    want = theirs.forward_features(x)
    ((feature_map, cls),) = ours(x)
    assert_close(cls, want[:, 0], 1e-10, 'class token')
    assert_close(feature_map.flatten(2).transpose(1, 2), want[:, 1 + registers :], 1e-10, 'map')


def loaded(registers, path, **kwargs):
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = idle_vit(registers, convert_weights=True, init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model


@each_number
def test_same_features_as_timm_at_any_size(registers, monkeypatch):
    theirs, ours = timm_model(registers), idle_vit(registers)
    ours.load_state_dict(convert_weights(theirs.state_dict(), 'mmseg').weights, strict=True)
    # timm resizes the table in float32, whatever the model's precision.
    monkeypatch.setattr(Tensor, 'float', Tensor.double)
    for size in SIZES:
        assert_same_features(ours, theirs, registers, size)


@each_number
@pytest.mark.parametrize('target', ['timm', 'dinov2', 'huggingface'])
def test_files_by_all_names(target, registers, tmp_path):
    theirs = timm_model(registers)
    converted = convert_weights(theirs.state_dict(), target).weights
    assert detect(converted).name == target
    torch.save(converted, tmp_path / 'dinov2.pth')
    ours = loaded(registers, tmp_path / 'dinov2.pth')
    assert_same_features(ours, theirs, registers, SIZES[0])
    back = convert_weights(ours.state_dict(), 'timm').weights
    theirs.load_state_dict(back, strict=True)


@each_number
def test_names_and_places_are_those_of_the_release(registers):
    """As timm's own filter reads it, which adds the class token's place to the class token."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs = timm_model(registers)
    released = convert_weights(theirs.state_dict(), 'dinov2').weights
    assert released['pos_embed'].shape[1] == 1 + 25
    # What the release has learned there is not 0.
    released['pos_embed'][:, 0] = 0.3
    ours = convert_weights({**released}, 'timm').weights
    filtered = checkpoint_filter_fn(dict(released), theirs)
    assert filtered.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in filtered.items())


def test_names_of_hugging_face():
    """Those of its Dinov2WithRegistersModel, which is not among the requirements."""
    state = timm_model(4).state_dict()
    theirs = convert_weights(state, 'huggingface').weights
    modules = ('norm1', 'attention.output.dense', 'norm2', 'mlp.fc1', 'mlp.fc2')
    modules += tuple(f'attention.attention.{part}' for part in ('query', 'key', 'value'))
    names = {f'encoder.layer.{i}.{module}' for i in range(3) for module in modules}
    names |= {'embeddings.patch_embeddings.projection', 'layernorm'}
    expected = {f'{name}.{leaf}' for name in names for leaf in ('weight', 'bias')}
    expected |= {f'encoder.layer.{i}.layer_scale{n}.lambda1' for i in range(3) for n in (1, 2)}
    tokens = ('cls_token', 'mask_token', 'register_tokens', 'position_embeddings')
    assert theirs.keys() == expected | {f'embeddings.{name}' for name in tokens}
    rows = [theirs[f'encoder.layer.1.attention.attention.{p}.bias'] for p in ('query', 'key')]
    assert torch.equal(torch.cat(rows), state['blocks.1.attn.qkv.bias'][:48])
    # A classifier has the network as a part.
    whole = {f'dinov2_with_registers.{key}': value for key, value in theirs.items()}
    whole['classifier.bias'] = torch.ones(5)
    back = convert_weights(whole, 'timm').weights
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    del theirs['encoder.layer.1.attention.attention.key.bias']
    with pytest.raises(SettingError, match=r'no counterpart.*1\.attention\.attention\.query\.bias'):
        convert_weights(theirs, 'mmseg')


@pytest.mark.parametrize('side', [42, 98])
def test_tables_are_resized_as_timm_does_when_they_load(side, tmp_path):
    """The one of 5 x 5 places shrinks smoothly to 3 x 3, by the backbone as by the tool."""
    from timm.layers import resample_abs_pos_embed

    for registers in NAMES:
        theirs = timm_model(registers).float()
        torch.save(theirs.state_dict(), tmp_path / f'{registers}.pth')
        ours = loaded(registers, tmp_path / f'{registers}.pth', img_size=side).pos_embed
        grid = (side // 14, side // 14)
        prefix = int(not registers)
        want = resample_abs_pos_embed(theirs.pos_embed, grid, (5, 5), prefix)
        assert_close(ours.float(), want, 1e-6)
        tool = convert_weights(theirs.state_dict(), 'mmseg', img_size=(side, side)).weights
        assert_close(tool['pos_embed'], want, 1e-6)


@pytest.mark.parametrize(
    ('given', 'options', 'said'),
    [
        (4, dict(num_registers=0), 'num_registers=0 .*allowed: num_registers=4'),
        (0, dict(num_registers=4), 'num_registers=4 .*allowed: num_registers=0'),
        (0, dict(layer_scale=0.0), 'layer_scale=False .*allowed: layer_scale=True'),
    ],
)
def test_another_kind_of_backbone_is_refused(given, options, said, tmp_path):
    torch.save(timm_model(given).state_dict(), tmp_path / 'dinov2.pth')
    with pytest.raises(SettingError, match=said) as error:
        loaded(options.pop('num_registers', given), tmp_path / 'dinov2.pth', **options)
    assert '\n' not in str(error.value)


@each_number
@pytest.mark.parametrize('size', ['small', 'base', 'large'])
def test_shapes_are_those_of_timm(size, registers):
    name, arch = NAMES[registers].replace('small', size), f'dinov2-{size}'
    with torch.device('meta'):
        theirs = timm.create_model(name, num_classes=0)
    options = dict(type='IdleVisionTransformer', num_registers=registers, num_layers=1)
    ours = MODELS.build(dict(options, arch=arch))
    assert shapes(convert_weights(ours.state_dict(), 'timm').weights) == {
        key: shape
        for key, shape in shapes(theirs.state_dict()).items()
        if not key.startswith('blocks.') or key.startswith('blocks.0.')
    }
    assert len(theirs.blocks) == ARCHS[arch]['num_layers']
    assert theirs.blocks[0].attn.num_heads == ARCHS[arch]['num_heads']


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}
