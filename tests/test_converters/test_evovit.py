"""Weights of Evo-ViT's release under mmseg's names: same values, same features."""

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import assert_close, image
from mmengine.registry import MODELS

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.converters import detect, format_of
from idlevit_mm.errors import SettingError


def evo_deit(blocks=2, channels=12):
    """Weights by the names of Evo-ViT's release, drawn at random."""
    shapes = {
        'cls_token': (1, 1, channels),
        'pos_embed': (1, 5, channels),
        'patch_embed.proj.weight': (channels, 3, 16, 16),
        'patch_embed.proj.bias': (channels,),
    }
    layers = dict.fromkeys(('head', 'head_cls'), (7, channels))
    norms = ['norm', 'norm_cls']
    for block in range(blocks):
        layers |= {
            f'qks.{block}.qk': (2 * channels, channels),
            f'vs.{block}.v': (channels, channels),
            f'projs.{block}': (channels, channels),
            f'blocks.{block}.mlp.fc1': (4 * channels, channels),
            f'blocks.{block}.mlp.fc2': (channels, 4 * channels),
        }
        norms += [f'norms.{block}', f'blocks.{block}.norm2']
    layers |= dict.fromkeys(norms, (channels,))
    for name, shape in layers.items():
        shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@torch.no_grad()
def test_evo_deit_keys_and_features(tmp_path):
    """The first block's branches are those of the release's layers, one after another."""
    state = evo_deit()
    assert detect(state).title == 'Evo-ViT release'
    path = tmp_path / 'evo.pth'
    torch.save(dict(model=state), path)
    model = (
        MODELS.build(
            dict(
                type='IdleVisionTransformer',
                img_size=32,
                embed_dims=12,
                num_layers=2,
                num_heads=3,
                norm_cfg=dict(type='LN', eps=1e-6),
                out_indices=(0,),
                convert_weights=True,
                init_cfg=dict(type='Pretrained', checkpoint=str(path)),
            )
        )
        .double()
        .eval()
    )
    model.init_weights()
    w = {name: value.double() for name, value in state.items()}
    images = image((2, 3, 32, 32), dtype=torch.float64)

    def linear(x, name):
        return F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])

    def norm(x, name):
        return F.layer_norm(x, (12,), w[f'{name}.weight'], w[f'{name}.bias'], 1e-6)

    x = F.conv2d(images, w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], 16)
    x = torch.cat([w['cls_token'].expand(2, -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + w['pos_embed']
    y = norm(x, 'norms.0')
    qk, v = (
        linear(y, 'qks.0.qk').unflatten(-1, (2, 3, 4)),
        linear(y, 'vs.0.v').unflatten(-1, (3, 4)),
    )
    weights = torch.einsum('bnhc,bmhc->bhnm', qk[:, :, 0], qk[:, :, 1]).div(2).softmax(-1)
    x = x + linear(torch.einsum('bhnm,bmhc->bnhc', weights, v).flatten(2), 'projs.0')
    hidden = F.gelu(linear(norm(x, 'blocks.0.norm2'), 'blocks.0.mlp.fc1'))
    x = x + linear(hidden, 'blocks.0.mlp.fc2')
    assert_close(model(images)[0].flatten(2).transpose(1, 2), x[:, 1:], 1e-10)
    back = format_of('vit', 'evovit').encode(model.float().state_dict()).state
    assert back.keys() == {n for n in state if not n.startswith(('head', 'norm_cls'))}
    assert all(torch.equal(back[name], state[name]) for name in back)
    del state['vs.1.v.bias']
    with pytest.raises(SettingError, match=r"1 of .* in Evo-ViT's names .*qks\.1\.qk\.bias"):
        format_of('vit', 'evovit').decode(state)
