"""timm's, DeiT's and LV-ViT's weights under mmseg's names: same values, same features."""

import math

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import assert_close, image, randomize
from mmengine.registry import MODELS
from torch import nn

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.converters import detect, format_of

timm = pytest.importorskip('timm')

EPS = dict(type='LN', eps=1e-6)
SMALL = dict(embed_dim=24, depth=3, num_heads=3, num_classes=5)
SAME = dict(embed_dims=24, num_layers=3, num_heads=3, norm_cfg=EPS, qkv_bias=True)
HEADS = ('head', 'head_dist', 'fc_norm', 'pre_logits')


def vit_from_timm(state):
    return format_of('vit', 'timm').decode(state).state


def vit_to_timm(state):
    return format_of('vit', 'timm').encode(state).state


def lvvit_from_official(state):
    return format_of('vit', 'official').decode(state).state


def title_of(state):
    found = detect(state)
    return None if found is None else found.title


def is_timm_vit(state):
    return title_of(state) == 'timm vit_*, deit_* or DeiT'


def is_lvvit(state):
    return title_of(state) == 'LV-ViT release'


def timm_model(name='deit_tiny_patch16_224', **kwargs):
    return randomize(timm.create_model(name, pretrained=False, **kwargs)).eval()


def mmseg_vit(**kwargs):
    theirs = pytest.importorskip('mmseg.models.backbones.vit')
    model = theirs.VisionTransformer(patch_bias=True, final_norm=True, **kwargs)
    model.eval()  # mmseg's returns None
    return model


def idle_vit(**kwargs):
    if 'IdleVisionTransformer' not in MODELS.module_dict:
        pytest.skip('IdleVisionTransformer is not there yet')
    return MODELS.build(dict(type='IdleVisionTransformer', **kwargs)).eval()


def features(model, x):
    """Tokens (B, 1 + N, C) after the final norm of mmseg's or our model, class token first."""
    with torch.no_grad():
        feature_map, cls = model(x)[-1]
    return torch.cat([cls[:, None], feature_map.flatten(2).transpose(1, 2)], dim=1)


def timm_features(model, x):
    with torch.no_grad():
        return model.forward_features(x)


# --- keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('deit_tiny_patch16_224', {}),
        ('deit_tiny_patch16_224', SMALL),
        ('deit_tiny_patch16_224', dict(SMALL, qkv_bias=True, num_classes=0)),
        ('vit_tiny_patch16_224', SMALL),
        ('vit_tiny_patch16_384', dict(SMALL, img_size=(40, 56))),
        ('vit_small_patch32_224', SMALL),
    ],
)
def test_round_trip(name, kwargs):
    model = timm_model(name, **kwargs)
    state = model.state_dict()
    assert is_timm_vit(state)
    assert not is_lvvit(state)
    converted = vit_from_timm(state)
    assert not is_timm_vit(converted)
    back = vit_to_timm(converted)
    assert set(state) - set(back) == {k for k in state if k.split('.')[0] in HEADS}
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    # The whole way round, from mmseg's side.
    again = vit_from_timm(back)
    assert again.keys() == converted.keys()
    assert all(torch.equal(value, converted[key]) for key, value in again.items())
    missing, unexpected = model.load_state_dict(back, strict=False)
    assert all(key.startswith('head') for key in missing)
    assert not unexpected


def test_distilled_models_lose_the_distillation_token_and_its_place():
    state = timm_model('deit_tiny_distilled_patch16_224', **SMALL).state_dict()
    assert is_timm_vit(state)
    assert state['pos_embed'].shape == (1, 198, 24)
    before = dict(state)
    converted = vit_from_timm(state)
    assert state.keys() == before.keys(), 'the input was changed'
    assert state['pos_embed'].shape == (1, 198, 24), 'the input was changed'
    table = converted['pos_embed']
    assert table.shape == (1, 197, 24)
    assert torch.equal(table[:, 0], before['pos_embed'][:, 0])
    assert torch.equal(table[:, 1:], before['pos_embed'][:, 2:])
    assert not any('dist' in key or 'head' in key for key in converted)
    back = vit_to_timm(converted)
    plain = timm_model('deit_tiny_patch16_224', **SMALL)
    missing, unexpected = plain.load_state_dict(back, strict=False)
    assert (sorted(missing), unexpected) == (['head.bias', 'head.weight'], [])


def test_keys_are_those_of_mmseg():
    converted = vit_from_timm(timm_model(**SMALL).state_dict())
    assert converted.keys() == mmseg_vit(**SAME).state_dict().keys()
    mmseg_vit(**SAME).load_state_dict(converted, strict=True)


def test_missing_biases_are_zero():
    state = timm_model(**SMALL, qkv_bias=False).state_dict()
    converted = vit_from_timm(state)
    assert converted.keys() == mmseg_vit(**SAME).state_dict().keys()
    for i in range(3):
        bias = converted[f'layers.{i}.attn.attn.in_proj_bias']
        assert bias.shape == (72,)
        assert not bias.any()


def test_names_of_mmpretrain():
    """Those of its VisionTransformer, which is not among the requirements."""
    mmseg = vit_from_timm(timm_model(**SMALL).state_dict())
    theirs = format_of('vit', 'mmpretrain').encode(mmseg).state
    modules = ('ln1', 'attn.qkv', 'attn.proj', 'ln2', 'ffn.layers.0.0', 'ffn.layers.1')
    names = {f'layers.{i}.{module}' for i in range(3) for module in modules}
    names |= {'patch_embed.projection', 'ln1'}
    leaves = {f'{name}.{leaf}' for name in names for leaf in ('weight', 'bias')}
    assert theirs.keys() == leaves | {'cls_token', 'pos_embed'}
    qkv = torch.equal(
        theirs['layers.1.attn.qkv.weight'], mmseg['layers.1.attn.attn.in_proj_weight']
    )
    assert qkv
    assert title_of({**theirs, 'head.layers.head.bias': torch.ones(5)}) == 'mmpretrain ViT'


def test_other_networks_are_told_apart():
    ours = mmseg_vit(**SAME).state_dict()
    assert not is_timm_vit(ours)
    assert not is_lvvit(ours)
    swin = timm.create_model('swin_tiny_patch4_window7_224', depths=(1, 1), embed_dim=24)
    assert not is_timm_vit(swin.state_dict())


@pytest.mark.parametrize(
    ('kwargs', 'key'),
    [
        (dict(qk_norm=True), r'blocks\.0\.attn\.q_norm\.weight'),
        (dict(pre_norm=True), r'norm_pre\.weight'),
    ],
)
def test_weights_without_a_counterpart_are_refused(kwargs, key):
    state = timm_model(**SMALL, **kwargs).state_dict()
    with pytest.raises(ValueError, match=key):
        vit_from_timm(state)


def test_unknown_weights_are_refused_on_the_way_back():
    state = vit_from_timm(timm_model(**SMALL).state_dict())
    with pytest.raises(ValueError, match=r'decode_head\.weight.*allowed'):
        vit_to_timm({**state, 'decode_head.weight': torch.ones(1)})


# --- features -------------------------------------------------------------------------------


@pytest.mark.parametrize('build', [mmseg_vit, idle_vit])
def test_same_features_as_timm(build):
    model = timm_model(**SMALL).double()
    ours = build(**SAME, output_cls_token=True).double()
    randomize(ours, 9)
    ours.load_state_dict(vit_from_timm(model.state_dict()), strict=True)
    x = image((2, 3, 224, 224), dtype=torch.float64)
    assert_close(features(ours, x), timm_features(model, x), 1e-10)


# --- LV-ViT ---------------------------------------------------------------------------------


class ReleasedLVViT(nn.Module):
    """LV-ViT with the parameter names of its release, without its training tricks."""

    def __init__(self, c, depth, heads, grid, stem=64, classes=5, residual_scale=0.5):
        super().__init__()
        self.heads, self.residual_scale = heads, residual_scale
        self.patch_embed = nn.Module()
        for i, (inputs, kernel, stride) in enumerate(((3, 7, 2), (stem, 3, 1), (stem, 3, 1)), 1):
            conv = nn.Conv2d(inputs, stem, kernel, stride, kernel // 2, bias=False)
            self.patch_embed.add_module(f'conv{i}', conv)
            self.patch_embed.add_module(f'bn{i}', nn.BatchNorm2d(stem))
        self.patch_embed.proj = nn.Conv2d(stem, c, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, c))
        self.blocks = nn.ModuleList(nn.Module() for _ in range(depth))
        for block in self.blocks:
            block.norm1, block.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv = nn.Linear(c, 3 * c, bias=False)
            block.attn.proj = nn.Linear(c, c)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.norm = nn.LayerNorm(c)
        self.head, self.aux_head = nn.Linear(c, classes), nn.Linear(c, classes)

    def forward(self, x):
        stem = self.patch_embed
        for conv, bn in ((stem.conv1, stem.bn1), (stem.conv2, stem.bn2), (stem.conv3, stem.bn3)):
            x = F.relu(bn(conv(x)))
        x = stem.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = x + self.residual_scale * self.attend(block, x)
            mlp = block.mlp
            x = x + self.residual_scale * mlp.fc2(F.gelu(mlp.fc1(block.norm2(x))))
        return self.norm(x)

    def attend(self, block, x):
        b, n, c = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(c // self.heads)).softmax(dim=-1)
        return block.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def released_lvvit(*args, **kwargs):
    model = randomize(ReleasedLVViT(*args, **kwargs))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.add_(1)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_lvvit_keys():
    state = released_lvvit(24, 3, 3, (5, 7)).state_dict()
    assert is_lvvit(state)
    assert not is_timm_vit(state)
    converted = lvvit_from_official(state)
    assert not is_lvvit(converted)
    for i, (conv, bn) in enumerate(((0, 1), (3, 4), (6, 7)), 1):
        stem = 'patch_embed.stem'
        pairs = {f'{stem}.{conv}.weight': f'conv{i}.weight'}
        for leaf in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
            pairs[f'{stem}.{bn}.{leaf}'] = f'bn{i}.{leaf}'
        for new, old in pairs.items():
            assert torch.equal(converted.pop(new), state[f'patch_embed.{old}']), new
    # What is left is a plain vision transformer, with biases of query, key and value that are 0.
    back = vit_to_timm(converted)
    for i in range(3):
        assert not back.pop(f'blocks.{i}.attn.qkv.bias').any()
    rest = {k for k in state if not k.startswith(('patch_embed.', 'head.', 'aux_head.'))}
    assert back.keys() == rest | {'patch_embed.proj.weight', 'patch_embed.proj.bias'}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_a_stem_without_a_place_is_refused():
    state = released_lvvit(24, 1, 3, (5, 7)).state_dict()
    with pytest.raises(ValueError, match=r'patch_embed\.conv1\.weight'):
        vit_from_timm(state)


def test_same_features_as_lvvit(tmp_path):
    torch.manual_seed(0)
    released = released_lvvit(384, 16, 6, (5, 7))
    torch.save(released.state_dict(), tmp_path / 'lvvit.pth')
    ours = idle_vit(
        arch='lvvit-small',
        img_size=(80, 112),
        output_cls_token=True,
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'lvvit.pth')),
    )
    randomize(ours, 9)
    ours.init_weights()
    x = image((2, 3, 80, 112), dtype=torch.float64)
    with torch.no_grad():
        expected = released.double()(x)
    assert_close(features(ours.double(), x), expected, 1e-9)


def test_square_table_of_as_many_places_is_resized(tmp_path):
    """A 4x4 table is not one of 2x8 places, though it has as many."""
    timm_model = timm.create_model(
        'vit_tiny_patch16_224', pretrained=False, img_size=64, num_classes=0
    )
    path = tmp_path / 'timm.pth'
    torch.save(timm_model.state_dict(), path)
    model = MODELS.build(
        dict(
            type='IdleVisionTransformer',
            arch='deit-tiny',
            img_size=(32, 128),
            convert_weights=True,
            init_cfg=dict(type='Pretrained', checkpoint=str(path)),
        )
    )
    model.init_weights()
    square = timm_model.state_dict()['pos_embed']
    assert torch.equal(model.pos_embed[:, :1], square[:, :1])
    grid = square[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    want = F.interpolate(grid, size=(2, 8), mode='bicubic').flatten(2).transpose(1, 2)
    assert torch.allclose(model.pos_embed[:, 1:], want)
