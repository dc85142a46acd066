"""Multiply-adds counted against figures worked out by hand and published ones."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.flops import (
    backbone_multiply_adds,
    count_multiply_adds,
    model_multiply_adds,
    pretty,
)


def test_linear_and_convolution():
    linear = nn.Linear(5, 7)
    assert count_multiply_adds(linear, torch.zeros(3, 5)) == 3 * 5 * 7
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    assert count_multiply_adds(conv, torch.zeros(2, 4, 9, 11)) == 2 * (5 * 6) * 6 * 4 * 9
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count_multiply_adds(depthwise, torch.zeros(1, 8, 5, 7)) == 5 * 7 * 8 * 9


def test_fused_attention_is_not_free_and_gathers_are():
    query = torch.zeros(2, 3, 10, 8)
    key = torch.zeros(2, 3, 6, 8)
    count = count_multiply_adds(scaled_dot_product_attention, query, key, key)
    assert count == 2 * (2 * 3) * 10 * 6 * 8
    assert count_multiply_adds(lambda: query.gather(2, torch.zeros(2, 3, 4, 8).long())) == 0


class _Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.dropped = nn.Dropout()
        self.dropped.eval()

    def forward(self, image):
        assert not self.training
        return self.conv(image)


def test_backbone_shapes_and_modes():
    backbone = _Convolutions()
    backbone.train()
    backbone.dropped.eval()
    assert backbone_multiply_adds(backbone, (5, 7)) == 5 * 7 * 6
    assert backbone_multiply_adds(backbone, (3, 5, 7)) == 5 * 7 * 6
    assert backbone_multiply_adds(backbone, (2, 3, 5, 7)) == 2 * 5 * 7 * 6
    assert backbone.training
    assert not backbone.dropped.training


@pytest.mark.parametrize('shape', [(5,), (1, 1, 3, 5, 7), (0, 7), (3, -1, 7)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match='input_shape'):
        backbone_multiply_adds(_Convolutions(), shape)


class _Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)

    def forward(self, features):
        return self.conv(features)


class _Segmentor(nn.Module):
    """Calls its head's forward directly, as mmdet and mmseg do."""

    def __init__(self):
        super().__init__()
        self.backbone = _Convolutions()
        self.decode_head = _Head()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, image, data_samples, mode):
        assert mode == 'tensor'
        features = self.backbone(image)
        logits = self.decode_head.forward(features)
        return logits.flatten(2).transpose(1, 2) @ torch.zeros(5, 4)


def test_parts_of_a_model():
    counts = model_multiply_adds(_Segmentor(), (5, 7))
    assert counts == {
        'backbone': 35 * 6,
        'decode_head': 35 * 2 * 5 * 9,
        'other': 35 * 5 * 4,
        'total': 35 * (6 + 90 + 20),
    }


def test_idle_tokens_save_exactly_their_share():
    # Stage 1: N = 256 tokens of C = 8, 64 keys, MLP 16; stage 2: N = 64, C = 16, 64 keys, MLP 48.
    cfg = dict(
        type='IdlePyramidVisionTransformer',
        embed_dims=8,
        num_stages=2,
        num_layers=[2, 1],
        num_heads=[1, 2],
        patch_sizes=[4, 2],
        strides=[4, 2],
        paddings=[0, 0],
        sr_ratios=[2, 1],
        mlp_ratios=[2, 3],
        out_indices=(0, 1),
        pretrain_img_size=64,
        policy=dict(scorer='uniform_grid'),
    )
    dense, idle = (
        backbone_multiply_adds(MODELS.build(dict(cfg, keep_ratios=ratio)), (64, 64))
        for ratio in (1.0, [0.5, 0.25])
    )

    def per_token(channels, keys, hidden):
        query_and_output = 2 * channels * channels
        attention = 2 * keys * channels
        return query_and_output + attention + 2 * channels * hidden

    saved = 2 * 128 * per_token(8, 64, 16) + 1 * 48 * per_token(16, 64, 48)
    assert dense - idle == saved


@pytest.mark.parametrize(
    ('name', 'arguments', 'published'),
    [
        ('SwinTransformer', {}, 96e9),
        ('PyramidVisionTransformer', {'num_layers': [3, 4, 6, 3]}, 135e9),
        ('PyramidVisionTransformerV2', {'embed_dims': 64, 'num_layers': [3, 4, 6, 3]}, 139e9),
        ('PyramidVisionTransformerV2', {'embed_dims': 32, 'num_layers': [2, 2, 2, 2]}, 27e9),
    ],
)
def test_published_figures_of_mmdet(name, arguments, published):
    backbones = pytest.importorskip('mmdet.models.backbones')
    backbone = getattr(backbones, name)(**arguments)
    # On the meta device nothing is computed, so that the full size costs no time.
    count = backbone_multiply_adds(backbone.to('meta'), (800, 1280))
    # The papers give whole G: half of one, and a percent.
    assert count == pytest.approx(published, rel=0.01, abs=0.5e9)


def test_pretty():
    assert pretty(95_600_000_000) == '95.6 G'
    assert pretty(512_345_678) == '512 M'
    assert pretty(82_000_000) == '82 M'
    assert pretty(17) == '17'
