"""Loading models for the analyses and changing what they keep."""

import sys

import pytest
import torch
from backbone_zoo import BY_NAME
from mmengine.registry import MODELS
from torch import nn

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.models import (
    host_backbone,
    idle_backbone,
    load_model,
    noise_image,
    with_keep_ratios,
)
from idlevit_mm.errors import UsageError

SWIN = dict(
    type='IdleSwinTransformer',
    embed_dims=8,
    depths=(2, 2),
    num_heads=(2, 4),
    strides=(4, 2),
    out_indices=(0, 1),
    window_size=4,
)
MIT = dict(
    type='IdleMixVisionTransformer',
    embed_dims=8,
    num_layers=[1, 1, 1, 1],
    num_heads=[1, 1, 1, 2],
    mlp_ratio=2,
    convert_weights=True,
)


def _config(tmp_path, backbone):
    path = tmp_path / 'model.py'
    path.write_text(f"custom_imports = dict(imports=['idlevit_mm'])\nmodel = {backbone!r}\n")
    return path


def test_weights_are_loaded_strictly(tmp_path):
    config = _config(tmp_path, SWIN)
    model = load_model(config, cfg_options={'model.keep_ratios': 0.5})
    assert not model.training
    assert model.keep_ratios == [[0.5, 0.5], [0.5, 0.5]]
    state = model.state_dict()
    torch.save({'state_dict': state}, tmp_path / 'weights.pth')
    loaded = load_model(config, tmp_path / 'weights.pth').state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)

    del state['norm0.weight']
    state['norm1.weight'] = torch.zeros(3)
    state['head'] = torch.zeros(1)
    torch.save(state, tmp_path / 'other.pth')
    with pytest.raises(UsageError, match=r'norm0.weight.*head.*norm1.weight') as caught:
        load_model(config, tmp_path / 'other.pth')
    assert '\n' not in str(caught.value)
    with pytest.raises(UsageError, match='nowhere.pth'):
        load_model(config, tmp_path / 'nowhere.pth')


def test_copies_share_their_weights_only():
    backbone = MODELS.build(dict(SWIN, keep_ratios=0.5)).eval()
    dense = with_keep_ratios(backbone, 1.0)
    image = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        backbone(image)
        dense(image)
    assert all(mask.all() for stage in dense.keep_masks for mask in stage)
    for mask in [mask for stage in backbone.keep_masks for mask in stage]:
        assert mask.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert backbone.keep_ratios[0] == [0.5, 0.5]
    shared = zip(backbone.parameters(), dense.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in shared)


VIT = dict(
    type='IdleVisionTransformer',
    img_size=(48, 80),
    patch_size=16,
    embed_dims=16,
    num_layers=3,
    num_heads=2,
)


@pytest.mark.parametrize(
    'options',
    [
        dict(arch='deit-tiny', num_layers=1, embed_dims=None, num_heads=None, img_size=[33]),
        dict(arch='lvvit-small', stem='patch', residual_scale=1.0, num_layers=2),
        dict(output_cls_token=True, patch_norm=True, act_cfg=dict(type='ReLU')),
    ],
    ids=['arch', 'lvvit arch', 'class token out'],
)
def test_dense_class_of_mmseg_gives_the_same(options):
    pytest.importorskip('mmseg')
    dense = _same_as_dense({**VIT, **options}, (49, 79))
    assert type(dense).__module__.startswith('mmseg.')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='lvvit-small'), r"stem='conv' \(as LV-ViT or DINOv2 has it\) has no dense"),
        (dict(arch='dinov2-small'), r'layer_scale=1e-05 .*has no dense class'),
        (dict(num_registers=4), r'num_registers=4 .*has no dense class'),
        (dict(interpolate_mode='bicubic-aa'), r"interpolate_mode='bicubic' alone"),
        (dict(residual_scale=0.5), r'residual_scale=0\.5 .*has no dense class.*keep_ratios=1\.0'),
        (dict(mlp_ratio=2.5), r'mlp_ratio=2\.5 has no dense class'),
    ],
)
def test_vits_that_mmseg_has_not_are_told(options, message):
    cfg = {**VIT, **options}
    with pytest.raises(ValueError, match=message) as error:
        host_backbone(MODELS.build(cfg), cfg)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'own', [dict(idle_where='pays'), dict(policy=dict(scorer='learned'))], ids=str
)
@pytest.mark.parametrize('name', ['swin', 'pvt', 'mit', 'vit'])
def test_the_dense_class_gets_nothing_of_idling(name, own):
    cfg = BY_NAME[name].config(keep_ratios=0.5, **own)
    pytest.importorskip(MODELS.get(cfg['type']).DENSE[0][0])
    model = MODELS.build(dict(cfg)).eval()
    dense = host_backbone(model, cfg)
    assert set(dense.state_dict()) < set(model.state_dict())


def _same_as_dense(cfg, size=(64, 64)):
    torch.manual_seed(0)
    backbone = MODELS.build(cfg).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # so that no table and no token is zero
    dense = host_backbone(backbone, cfg)
    assert type(dense).__name__ == type(backbone).__name__.removeprefix('Idle')
    assert not dense.training
    image = torch.randn(3, 3, *size)
    with torch.no_grad():
        ours, theirs = list(backbone(image)), list(dense(image))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return dense


def test_dense_backbones_are_told():
    with pytest.raises(TypeError, match='Conv2d is not an idle backbone'):
        idle_backbone(nn.Conv2d(3, 3, 1))
    pytest.importorskip('mmdet')
    with pytest.raises(ValueError, match='Conv2d has no dense class'):
        host_backbone(nn.Conv2d(3, 3, 1), {})


@pytest.mark.parametrize(
    ('cfg', 'library', 'project'),
    [(SWIN, 'mmdet', 'mmdetection'), (MIT, 'mmseg', 'mmsegmentation')],
    ids=['swin', 'mit'],
)
def test_a_library_that_is_not_there_is_told(cfg, library, project, monkeypatch):
    monkeypatch.setitem(sys.modules, f'{library}.models', None)
    backbone = MODELS.build(cfg)
    message = f'the dense class of {cfg["type"]} is in {project}, which cannot be imported: '
    with pytest.raises(ValueError, match=message) as error:
        host_backbone(backbone, cfg)
    assert '\n' not in str(error.value)


def test_shapes():
    assert noise_image((5, 7)).shape == (1, 3, 5, 7)
    assert noise_image([4, 5, 7]).shape == (1, 4, 5, 7)
    assert torch.equal(noise_image((2, 4, 5, 7)), noise_image((2, 4, 5, 7)))
