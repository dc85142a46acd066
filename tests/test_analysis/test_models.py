"""Loading models for the analyses and changing what they keep."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.models import (
    checked_shape,
    host_backbone,
    idle_backbone,
    load_model,
    share_kept,
    with_keep_ratios,
)
from idlevit_mm.engine.errors import UsageError

SWIN = dict(
    type='IdleSwinTransformer',
    embed_dims=8,
    depths=(2, 2),
    num_heads=(2, 4),
    strides=(4, 2),
    out_indices=(0, 1),
    window_size=4,
)
PVT2 = dict(
    type='IdlePyramidVisionTransformerV2',
    embed_dims=8,
    num_layers=[1, 1, 1, 1],
    num_heads=[1, 1, 1, 2],
    sr_ratios=[4, 2, 1, 1],
    mlp_ratios=[2, 2, 2, 2],
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
    assert share_kept(dense) == 1.0
    assert share_kept(backbone) == pytest.approx(0.5, abs=0.02)
    assert backbone.keep_ratios[0] == [0.5, 0.5]
    shared = zip(backbone.parameters(), dense.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in shared)


@pytest.mark.parametrize('cfg', [SWIN, PVT2], ids=['swin', 'pvtv2'])
def test_dense_class_of_mmdet_gives_the_same(cfg):
    pytest.importorskip('mmdet')
    cfg = dict(cfg, keep_ratios=1.0, policy=dict(scorer='random'))
    backbone = MODELS.build(cfg).eval()
    dense = host_backbone(backbone, cfg)
    assert type(dense).__name__ == type(backbone).__name__.removeprefix('Idle')
    assert not dense.training
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(backbone(image), dense(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dense_backbones_are_told():
    with pytest.raises(TypeError, match='Conv2d is not an idle backbone'):
        idle_backbone(nn.Conv2d(3, 3, 1))
    pytest.importorskip('mmdet')
    with pytest.raises(ValueError, match='Conv2d has no dense class'):
        host_backbone(nn.Conv2d(3, 3, 1), {})


def test_shapes():
    assert checked_shape((5, 7)) == (1, 3, 5, 7)
    assert checked_shape([4, 5, 7]) == (1, 4, 5, 7)
    assert checked_shape((2, 4, 5, 7)) == (2, 4, 5, 7)
