"""Multiply-adds counted against figures worked out by hand and published ones."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from backbone_zoo import image, parametrize, weighted_sum
from mmengine.registry import MODELS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.flops import (
    MultiplyAddCounter,
    backbone_multiply_adds,
    count_multiply_adds,
    model_multiply_adds,
    pretty,
)
from idlevit_mm.analysis.models import load_config, parse_shapes

CONFIGS = Path(__file__).parents[2] / 'configs'


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


class _Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.branch = nn.Conv2d(2, 1, 1)

    def forward(self, features):
        """What no module does is the head's too."""
        logits = self.conv(features)
        return torch.einsum('bchw,cd->bdhw', logits, torch.zeros(5, 5))


class _Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1)

    def forward(self, features, branch):
        return branch(self.mix(features))


class _Segmentor(nn.Module):
    """Calls its head's forward directly, as mmdet and mmseg do, and lends what is in it."""

    def __init__(self):
        super().__init__()
        self.backbone = _Convolutions()
        self.decode_head = _Head()
        self.decoder = _Decoder()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, image, data_samples, mode):
        assert mode == 'tensor'
        features = self.backbone(image)
        logits = self.decode_head.forward(features)
        self.decoder(features, self.decode_head.branch)
        return logits.flatten(2).transpose(1, 2) @ torch.zeros(5, 4)


def test_parts_of_a_model():
    model = _Segmentor()
    counts = model_multiply_adds(model, (5, 7))
    assert counts == {
        'backbone': 35 * 6,
        'decode_head': 35 * (2 * 5 * 9 + 5 * 5 + 2),
        'decoder': 35 * 2 * 2,
        'other': 35 * 5 * 4,
        'total': 35 * (6 + 117 + 4 + 20),
    }
    assert 'forward' not in vars(model.decode_head)


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


def _attention_case(batch, queries, keys, mask, dtype=torch.float32):
    """Inputs of attention with 3 heads of 8 channels, and the multiply-adds of one product."""
    query = torch.randn(batch, 3, queries, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(batch, 3, keys, 8, dtype=dtype, requires_grad=True) for _ in 'kv')
    shape = {'none': None, 'shared': (queries, keys), 'keys': (batch, 1, 1, keys)}[mask]
    mask = None if shape is None else torch.zeros(shape, dtype=dtype)
    return (query, key, value, mask), batch * 3 * queries * keys * 8


@pytest.mark.parametrize('backend', [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize('mask', ['none', 'shared', 'keys'])
def test_attention_counts_the_same_in_every_kernel(mask, backend):
    for batch, queries, keys in ((1, 10, 6), (3, 7, 7), (3, 49, 5)):
        inputs, product = _attention_case(batch, queries, keys, mask)
        with sdpa_kernel(backend), MultiplyAddCounter() as counter:
            out = scaled_dot_product_attention(*inputs)
            assert counter.multiply_adds == 2 * product
            out.sum().backward()
        assert counter.multiply_adds == 6 * product


def test_counting_leaves_the_kernel_alone():
    inputs, _ = _attention_case(1, 10, 6, 'none')
    with MultiplyAddCounter() as counter:
        scaled_dot_product_attention(*inputs).sum().backward()
    ops = {str(op) for op in counter.get_flop_counts()['Global']}
    assert ops == {
        'aten._scaled_dot_product_flash_attention_for_cpu',
        'aten._scaled_dot_product_flash_attention_for_cpu_backward',
    }


@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_attention_under_autocast_and_with_a_learned_mask(dropout):
    inputs, product = _attention_case(2, 9, 5, 'shared')
    inputs[3].requires_grad_()
    with torch.autocast('cpu', torch.bfloat16), MultiplyAddCounter() as counter:
        scaled_dot_product_attention(*inputs, dropout_p=dropout).float().sum().backward()
    assert counter.multiply_adds == 6 * product


@pytest.mark.parametrize('convolution', [nn.Conv2d, nn.ConvTranspose2d])
def test_gradients_of_grouped_convolutions(convolution):
    image = torch.zeros(2, 8, 5, 7, requires_grad=True)
    for groups in (1, 2, 8):
        layer = convolution(8, 8, 3, padding=1, groups=groups)
        forward = 2 * 35 * 8 * 8 * 9 // groups
        with MultiplyAddCounter() as counter:
            layer(image).sum().backward()
        assert counter.multiply_adds == 3 * forward
        with MultiplyAddCounter() as counter:
            layer(image.detach()).sum().backward()
        assert counter.multiply_adds == 2 * forward


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


def test_own_functions_and_recomputation_count_as_they_run():
    x = torch.zeros(6, 5, requires_grad=True)
    weight = torch.zeros(5, 5, requires_grad=True)
    with MultiplyAddCounter() as counter:
        _Squared.apply(x, weight).sum().backward()
    assert counter.multiply_adds == 3 * 150
    with MultiplyAddCounter() as counter:
        checkpoint(_Squared.apply, x, weight, use_reentrant=False).sum().backward()
    assert counter.multiply_adds == 4 * 150


@pytest.mark.parametrize('fused', [True, False])
def test_attention_modules_that_run_as_one_operation(fused):
    tokens = torch.zeros(2, 9, 16)
    attention = 2 * 9 * 16 * (4 * 16 + 2 * 9)
    modules = {
        nn.MultiheadAttention(16, 4, batch_first=True): attention,
        nn.TransformerEncoderLayer(16, 4, 40, batch_first=True): attention + 2 * 2 * 9 * 16 * 40,
    }
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        for module, expected in modules.items():
            module.eval()
            inputs = (tokens,) * (3 if isinstance(module, nn.MultiheadAttention) else 1)
            assert count_multiply_adds(module, *inputs) == expected
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_products_with_vectors():
    matrix, vector = torch.zeros(6, 5), torch.zeros(5)
    assert count_multiply_adds(lambda: matrix @ vector) == 30
    assert count_multiply_adds(lambda: torch.addmv(torch.zeros(6), matrix, vector)) == 30
    assert count_multiply_adds(lambda: vector @ vector) == 5
    assert count_multiply_adds(
        lambda: torch.addbmm(matrix, matrix[None], torch.zeros(1, 5, 5))
    ) == (150)


@parametrize()
@pytest.mark.parametrize('train', [False, True])
def test_backbones_count_the_same_on_the_math_path(variant, train):
    model = variant.build(keep_ratios=0.5).train(train)
    counts = []
    for backend in (None, SDPBackend.MATH):
        path = nullcontext() if backend is None else sdpa_kernel(backend)
        with path, torch.set_grad_enabled(train), MultiplyAddCounter() as counter:
            outs = model(image((1, 3, 70, 90)))
            if train:
                weighted_sum(outs).backward()
        counts.append(counter.multiply_adds)
    assert counts[0] == counts[1]
    assert counts[0] > 0


class _Detector(_Segmentor):
    """With a preprocessor, as the runner calls it."""

    def data_preprocessor(self, batch, training):
        assert not training
        return {'inputs': batch, 'data_samples': None}


def test_average_over_data(tool):
    model, count_data = _Detector(), tool('get_flops').count_data
    batches = [torch.zeros(1, 3, 5, 7), torch.zeros(2, 3, 6, 7)]
    count = count_data(model, batches, training=False, backbone_only=False)
    assert count['images'] == 3
    assert count['parts']['backbone'] == pytest.approx((35 + 2 * 42) / 3 * 6)
    assert list(count['parts']) == ['backbone', 'decode_head', 'decoder', 'other', 'total']
    assert (count['low'], count['high']) == (35 * 147, 42 * 147)
    assert count['share_active'] is None
    assert model.training
    with pytest.raises(ValueError, match='batches'):
        count_data(model, [], training=False, backbone_only=False)


def test_shapes_of_a_command_line():
    assert parse_shapes(['512x512', '800X1280']) == [(512, 512), (800, 1280)]
    assert parse_shapes(['800', '1280']) == [(800, 1280)]
    assert parse_shapes(['7x9']) == [(7, 9)]
    for texts in (['512'], ['0x5'], ['5x5x5'], ['ax5'], ['5x5', '7'], ['-1x3'], ['5', '5', '5']):
        with pytest.raises(ValueError, match='shape='):
            parse_shapes(texts)


def test_published_figure_of_a_whole_segmentor():
    pytest.importorskip('mmseg')
    cfg = load_config(CONFIGS / 'ade20k' / 'idle-swin-t_upernet_8xb2-160k_ade20k-512x512.py')
    backbone = cfg.model.backbone
    accepted = ('embed_dims', 'depths', 'num_heads', 'window_size', 'out_indices')
    cfg.model.backbone = {key: backbone[key] for key in accepted if key in backbone}
    cfg.model.backbone['type'] = 'mmseg.SwinTransformer'
    counts = model_multiply_adds(MODELS.build(cfg.model).to('meta'), (512, 512))
    assert counts['total'] == pytest.approx(237e9, rel=0.01)
    assert counts['total'] == sum(counts.values()) / 2


@pytest.mark.parametrize(('size', 'published'), [('b0', 8.4e9), ('b1', 15.9e9)])
def test_published_figures_of_segformer(size, published):
    mmseg = pytest.importorskip('mmseg')
    configs = Path(mmseg.__file__).parent / '.mim' / 'configs' / 'segformer'
    cfg = load_config(configs / f'segformer_mit-{size}_8xb2-160k_ade20k-512x512.py')
    idle = {**cfg.model.backbone, 'type': 'IdleMixVisionTransformer', 'init_cfg': None}
    totals = []
    for backbone in ({**cfg.model.backbone, 'init_cfg': None}, idle):
        cfg.model.backbone = backbone
        model = MODELS.build(cfg.model).to('meta')
        totals.append(model_multiply_adds(model, (512, 512))['total'])
    assert totals[0] == totals[1] == pytest.approx(published, rel=0.01)


def test_pretty():
    assert pretty(95_600_000_000) == '95.6 G'
    assert pretty(512_345_678) == '512 M'
    assert pretty(82_000_000) == '82 M'
    assert pretty(17) == '17'
    assert pretty(999_900_000) == '1000 M'
