"""One table of small variants of every registered idle backbone.

All backbone tests are parametrised over it; a new backbone is tested by adding it here.
Shape letters: B images, C channels, H and W rows and columns of tokens, N = H * W.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.blocks import Carried, Tokens
from idlevit_mm.checkpoints import FOLLOWING
from idlevit_mm.registry import arguments_of

SCORERS = ('mean_distance', 'activation_norm', 'mean_query', 'random', 'uniform_grid')
DETERMINISTIC_SCORERS = tuple(s for s in SCORERS if s != 'random')

_SWIN = dict(embed_dims=8, depths=(2, 2), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1))
_PVT = dict(
    embed_dims=8,
    num_stages=2,
    num_layers=[2, 2],
    num_heads=[1, 2],
    strides=[4, 2],
    sr_ratios=[2, 1],
    mlp_ratios=[2, 3],
    out_indices=(0, 1),
)
_ARCH = ('embed_dims', 'depths', 'num_heads', 'extra_norm_every_n_blocks')
_SWIN2 = dict(embed_dims=8, depths=(2, 2), num_heads=(2, 4), extra_norm_every_n_blocks=0)
_SWIN2 |= dict(window_size=4, pad_small_map=True, out_indices=(0, 1))
_PVT1 = dict(_PVT, patch_sizes=[4, 2], paddings=[0, 0], pretrain_img_size=32)
_MIT = {key: value for key, value in _PVT.items() if key != 'mlp_ratios'}
_MIT |= dict(patch_sizes=[7, 3], mlp_ratio=2)
_TWINS = dict(
    embed_dims=[8, 16],
    depths=[2, 2],
    num_heads=[1, 2],
    strides=[4, 2],
    patch_sizes=[4, 2],
    sr_ratios=[2, 1],
    mlp_ratios=[2, 3],
    qkv_bias=True,
    out_indices=(0, 1),
)
# Nothing in a plain ViT needs whole multiples: an odd grid of 9 by 13 patches.
_VIT = dict(
    img_size=(36, 52),
    patch_size=4,
    embed_dims=8,
    num_layers=3,
    num_heads=2,
    mlp_ratio=2,
    norm_cfg=dict(type='LN', eps=1e-6),
    patch_bias=True,
    final_norm=True,
    out_indices=(0, 2),
)


_VITDET = dict(
    {key: value for key, value in _VIT.items() if key not in ('patch_bias', 'final_norm')},
    window_size=3,
    window_block_indexes=(0, 1),
)
# Dense classes that the wheels lack, or whose weights have other names.
PROJECTS = (('mmdet', 'ViT'), ('mmpretrain', 'VisionTransformer'))


@dataclass(frozen=True)
class Variant:
    """A small model of one backbone class.

    Args:
        name: Test id.
        type: Registered name of the idle backbone.
        kwargs: Constructor arguments of the small model, valid for the dense twin too.
        scopes: Selection scopes the class allows.
        sizes: Image sizes (B, 3, height, width) the dense twin accepts.
        has_twin: Whether the dense classes of the family can be built like this.
    """

    name: str
    type: str
    kwargs: dict[str, Any]
    scopes: tuple[str, ...]
    sizes: tuple[tuple[int, int, int, int], ...]
    has_twin: bool = True

    @property
    def twins(self) -> dict[str, str]:
        """Names of the dense twins by library."""
        found = dict(MODELS.get(self.type).DENSE) if self.has_twin else {}
        return {library: name for library, name in found.items() if (library, name) not in PROJECTS}

    @property
    def is_swin(self) -> bool:
        return 'Swin' in self.type

    @property
    def is_vit(self) -> bool:
        return self.type == 'IdleVisionTransformer'

    @property
    def is_vitdet(self) -> bool:
        return self.type == 'IdleViTDet'

    @property
    def is_plain(self) -> bool:
        return self.is_vit or self.is_vitdet

    @property
    def is_twins(self) -> bool:
        return self.type in ('IdlePCPVT', 'IdleSVT')

    @property
    def has_class_token(self) -> bool:
        return self.is_vit and self.kwargs.get('with_cls_token', True)

    @property
    def frozen_first(self) -> int:
        """What ``frozen_stages`` is for the first stage alone; mmpretrain counts from 0."""
        return 0 if self.type == 'IdleSwinTransformerV2' else 1

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        depths = self.kwargs.get('depths', self.kwargs.get('num_layers'))
        return (depths,) if isinstance(depths, int) else tuple(depths)

    def arguments(self, **overrides: Any) -> dict[str, Any]:
        """Of a constructor, of which Swin V2's has the numbers of its architecture in one."""
        given = {**self.kwargs, **overrides}
        if self.type == 'IdleSwinTransformerV2':
            given['arch'] = {name: given.pop(name) for name in _ARCH}
        return given

    def config(self, **overrides: Any) -> dict[str, Any]:
        return dict(type=self.type, **self.arguments(**overrides))

    def wide(self, embed_dims: int) -> dict[str, Any]:
        """Arguments for other channels, of the first stage where stages differ."""
        if not self.is_twins:
            return dict(embed_dims=embed_dims)
        own = self.kwargs['embed_dims']
        return dict(embed_dims=[width * embed_dims // own[0] for width in own])

    def build(self, **overrides: Any) -> nn.Module:
        return MODELS.build(self.config(**overrides))

    def build_twin(self, library: str | None = None, **overrides: Any) -> nn.Module:
        """The dense model of ``library``, by default of the first that has one.

        Skips the test where there is none, or the library is not installed.
        """
        library = library or next(iter(self.twins), 'mmdet')
        pytest.importorskip(library)
        if library not in self.twins:
            pytest.skip(f'{library} has no {self.type.removeprefix("Idle")} like {self.name}')
        twin = getattr(importlib.import_module(f'{library}.models'), self.twins[library])
        settings = self.arguments(**overrides)
        if self.is_vitdet:
            # Its shape is an argument of its own.
            settings, _ = self.build(**overrides).dense_twin(settings)
            settings = {k: v for k, v in settings.items() if k in arguments_of(twin)}
        return twin(**settings)


_SWIN_SIZES = ((1, 3, 97, 131), (3, 3, 64, 80), (1, 3, 4, 40), (2, 3, 40, 4), (1, 3, 4, 4))
_V2_SIZES = ((1, 3, 97, 131), (3, 3, 64, 80), (2, 3, 40, 17), (1, 3, 17, 17))
# The second stage of the last two is one row of tokens, and one token.
_MIT_SIZES = (*_V2_SIZES[:2], (2, 3, 40, 17), (2, 3, 5, 40), (1, 3, 5, 8))
_VIT_SIZES = ((1, 3, 97, 131), (3, 3, 64, 80), (1, 3, 4, 40), (2, 3, 40, 4), (1, 3, 4, 4))
# The dense classes need a whole cell of the spatial reduction.
_TWINS_SIZES = ((1, 3, 97, 131), (3, 3, 64, 80), (1, 3, 8, 40), (2, 3, 40, 9), (1, 3, 5, 8))
_PVT_SIZES = ((1, 3, 97, 131), (3, 3, 64, 80), (1, 3, 8, 40), (2, 3, 40, 9), (1, 3, 8, 8))


def _family(
    type: str,
    base: dict[str, Any],
    sizes: tuple[tuple[int, int, int, int], ...],
    scopes: tuple[str, ...] = ('map',),
) -> Callable[..., Variant]:
    """What makes variants of a class, from a name and what is other than in its small model."""

    def variant(name: str, has_twin: bool = True, **kwargs: Any) -> Variant:
        return Variant(name, type, {**base, **kwargs}, scopes, sizes, has_twin)

    return variant


_WINDOWS = ('map', 'window_tokens', 'windows')
_swin = _family('IdleSwinTransformer', _SWIN, _SWIN_SIZES, _WINDOWS)
_swin2 = _family('IdleSwinTransformerV2', _SWIN2, _SWIN_SIZES, _WINDOWS)
_pvt = _family('IdlePyramidVisionTransformer', _PVT1, _PVT_SIZES)
_pvt2 = _family('IdlePyramidVisionTransformerV2', _PVT, _V2_SIZES)
_mit = _family('IdleMixVisionTransformer', _MIT, _MIT_SIZES)
_vit = _family('IdleVisionTransformer', _VIT, _VIT_SIZES)
# First that of the table: the dense class resizes it in single precision.
_vitdet = _family('IdleViTDet', _VITDET, ((1, 3, 36, 52), *_VIT_SIZES[1:]))
_pcpvt = _family('IdlePCPVT', _TWINS, _TWINS_SIZES)
_svt = _family('IdleSVT', _TWINS, _TWINS_SIZES)


# PyramidVisionTransformerV2 fixes four patch sizes, so its small model has four stages.
_FOUR_STAGES = dict(
    num_stages=4,
    num_layers=[1, 2, 1, 1],
    num_heads=[1, 2, 2, 4],
    strides=[4, 2, 2, 2],
    sr_ratios=[2, 1, 2, 1],
    mlp_ratios=[2, 3, 2, 2],
    out_indices=(0, 1, 2, 3),
)

# Patches of even size and without overlap, a stride of 3, another norm and activation.
_ODD_MIT = dict(
    embed_dims=6,
    num_stages=3,
    num_layers=[1, 1, 2],
    num_heads=[3, 1, 2],
    patch_sizes=[4, 2, 5],
    strides=[3, 2, 1],
    sr_ratios=[2, 1, 2],
    mlp_ratio=3,
    qkv_bias=False,
    drop_path_rate=0.4,
    act_cfg=dict(type='ReLU'),
    norm_cfg=dict(type='LN'),
    out_indices=(0, 2),
)

# Patches that overlap, more of their sizes than stages, no bias, heads as wide as kernels want.
_ODD_SVT = dict(
    embed_dims=[16, 32, 48],
    depths=[1, 3, 2],
    num_heads=[1, 2, 3],
    patch_sizes=[5, 3, 2, 2],
    strides=[4, 2, 2, 2],
    sr_ratios=[4, 2, 1],
    mlp_ratios=[2, 2, 2],
    windiow_sizes=[7, 5, 2],
    qkv_bias=False,
    drop_path_rate=0.4,
    norm_cfg=dict(type='LN', eps=1e-6),
    norm_after_stage=False,
    out_indices=(0, 2),
)

FAMILIES = (
    _swin('swin', window_size=4),
    _pvt('pvt'),
    _pvt2('pvtv2', **_FOUR_STAGES),
    _mit('mit'),
    _pcpvt('pcpvt', depths=[3, 2]),
    _svt('svt', windiow_sizes=[4, 3]),
    _vit('vit'),
    _vitdet('vitdet'),
    _swin2('swinv2'),
)
_NORM3 = dict(extra_norm_every_n_blocks=2, depths=(2, 3), pretrained_window_sizes=(3, 9))
_OTHERS = (
    _swin('swin-w7', window_size=7, depths=(2, 3)),
    _swin('swin-plain', window_size=4, patch_norm=False, qkv_bias=False, qk_scale=0.3),
    _swin('swin-mlp-drop-path', window_size=5, mlp_ratio=2, drop_path_rate=0.4),
    _swin('swin-patch2', window_size=3, patch_size=2, strides=(2, 2)),
    _pvt('pvt-no-abs', use_abs_pos_embed=False, qkv_bias=False, drop_path_rate=0.4),
    _pvt('pvt-conv-norm', use_conv_ffn=True, norm_after_stage=True),
    _pvt2('pvtv2-plain', **{**_FOUR_STAGES, 'qkv_bias': False, 'norm_cfg': dict(type='LN')}),
    _mit('mit-odd', **_ODD_MIT),
    _family('IdleSVT', _TWINS, _MIT_SIZES[:3])('svt-odd', **_ODD_SVT),
    _vit('vit-3-heads', embed_dims=12, num_heads=3, drop_path_rate=0.4, patch_norm=True),
    _vit('vit-plain', qkv_bias=False, final_norm=False, patch_bias=False, out_indices=2),
    # mmseg's class without class token embeds one all the same; LV-ViT and DINOv2 it has not.
    _vit('vit-no-cls', has_twin=False, with_cls_token=False),
    _vit('vit-conv-stem', has_twin=False, stem='conv', residual_scale=0.5, mlp_ratio=3),
    _vit('vit-scaled', has_twin=False, layer_scale=0.1, interpolate_mode='bicubic-aa'),
    _swin2('swinv2-norm3', window_size=5, drop_path_rate=0.4, **_NORM3),
    _vit('vit-registers', has_twin=False, layer_scale=0.1, num_registers=3),
    _vitdet('vitdet-sam', out_channels=6, use_rel_pos=False, qkv_bias=False, out_indices=2),
)
VARIANTS = FAMILIES + _OTHERS
BY_NAME = {v.name: v for v in VARIANTS}


def parametrize(variants: tuple[Variant, ...] = FAMILIES):
    """``pytest.mark.parametrize`` over variants, with readable ids."""
    return pytest.mark.parametrize('variant', variants, ids=[v.name for v in variants])


def variant_scopes(variants: tuple[Variant, ...] = FAMILIES) -> list:
    """pytest parameters (variant, scope) of every scope each variant allows."""
    return [pytest.param(v, scope, id=f'{v.name}-{scope}') for v in variants for scope in v.scopes]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter, biases and tables included, a random value of sensible size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim == 1:
                value = 0.2 * noise + (1.0 if _is_norm_weight(model, name) else 0.0)
            elif 'pos_embed' in name or 'bias_table' in name or 'rel_pos' in name:
                value = 0.5 * noise
            else:
                value = noise * p[0].numel() ** -0.5
            p.copy_(value.to(p))
    return model


def _is_norm_weight(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition('.')
    return leaf == 'weight' and isinstance(model.get_submodule(owner), nn.LayerNorm)


def image(size: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible noise image (B, 3, height, width) with smooth and busy regions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x[..., : size[-1] // 2] *= 0.3
    return x.to(dtype)


def stage_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Blocks of each stage. State-dict compatibility with mmdet fixes where they sit."""
    if hasattr(model, 'stages'):
        return [list(stage.blocks) for stage in model.stages]
    if hasattr(model, 'position_encodings'):
        return [list(stage) for stage in model.layers]
    if hasattr(model.layers[0], 'ffn'):
        return [list(model.layers)]
    return [[b for b in layer[1] if hasattr(b, 'ffn')] for layer in model.layers]


class BlockTrace:
    """Records input and output (B, N, C) and size (H, W) of every block of a model's forwards.

    Rows that stay packed from block to block are put in their places; those behind the map (class
    token, fused tokens) are left out.

    Attributes:
        calls: ``calls[stage][block]`` = (input, output, (H, W)) of the last forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[list[Any]] = [[None] * len(blocks) for blocks in stage_blocks(model)]
        self._handles = []
        for s, blocks in enumerate(stage_blocks(model)):
            for b, block in enumerate(blocks):
                self._handles += self._watch(block, s, b)

    def _watch(self, block: nn.Module, s: int, b: int) -> list:
        before: list[Tensor] = []

        def whole(x, args, carried):
            height, width = map(int, args['hw_shape'])
            tokens = Tokens(x, (height, width), carried.pack)
            # A copy, so that a block that writes into its input is found out.
            return block.settled(tokens).detach()[:, : height * width].clone()

        def named(args, kwargs):
            return {
                **dict(zip(('x', 'hw_shape', 'keep_ratio', 'carried'), args, strict=False)),
                **kwargs,
            }

        def pre(_module, args, kwargs):
            args = named(args, kwargs)
            before[:] = [whole(args['x'], args, args.get('carried', Carried()))]

        def post(_module, args, kwargs, output):
            args = named(args, kwargs)
            hw_shape = tuple(map(int, args['hw_shape']))
            self.calls[s][b] = (before[0], whole(output[0], args, output[1]), hw_shape)

        return [
            block.register_forward_pre_hook(pre, with_kwargs=True),
            block.register_forward_hook(post, with_kwargs=True),
        ]

    def __enter__(self) -> BlockTrace:
        return self

    def __exit__(self, *_exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def window_ids(hw: tuple[int, int], window: int, shift: int) -> Tensor:
    """Window number (H, W) of every token, by padding and rolling as the dense block does."""
    h, w = hw
    hp, wp = -(-h // window) * window, -(-w // window) * window
    rows = torch.arange(hp)[:, None].expand(hp, wp) // window
    cols = torch.arange(wp)[None, :].expand(hp, wp) // window
    rolled = rows * (wp // window) + cols
    return torch.roll(rolled, (shift, shift), (0, 1))[:h, :w]


def kept(keep: float, units: int) -> int:
    """K of ``units`` units."""
    return max(1, round(keep * units))


def assert_close(actual: Tensor, expected: Tensor, tol: float, what: str = '') -> None:
    """Largest difference is at most ``tol`` times the larger of 1 and the largest value."""
    assert actual.shape == expected.shape, f'{what}: {actual.shape} != {expected.shape}'
    if actual.numel() == 0:
        return
    diff = (actual - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    assert diff <= tol * scale, f'{what}: differs by {diff:.3g} at scale {scale:.3g}'


def assert_all_close(actual: Iterable[Tensor], expected: Iterable[Tensor], tol: float) -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one, other, tol, f'output {number}')


def all_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether these are as many tensors and the same to the bit."""
    return all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def load_twin(twin: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load all weights of a dense model; mmpretrain's Swin V2 drops its buffers as it loads."""
    report = twin.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert all(key.endswith(FOLLOWING) for key in report.missing_keys), report.missing_keys
    twin.eval()  # returns None in mmdet
    return twin


def weighted_sum(outputs, seed: int = 7) -> Tensor:
    """Scalar that depends on every element of the outputs, each by its own random weight."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for out in outputs:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        total = total + (out * weight.to(out)).sum()
    return total


def gradients(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and gradients of the weighted sum for the input and every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    outputs = model(x)
    weighted_sum(outputs).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads['input'] = x.grad
    return [out.detach() for out in outputs], grads


def assert_same_gradients(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tol: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        if want is None:
            assert actual[name] is None, f'{name} has a gradient'
        else:
            assert actual[name] is not None, f'{name} has no gradient'
            assert_close(actual[name], want, tol, f'gradient of {name}')
