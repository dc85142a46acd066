"""ViTDet with idle tokens (arXiv 2203.16527): a plain ViT with windows, the encoder of SAM too.

Shape letters: B images, N tokens of the map (H * W), C channels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import ModuleList
from mmengine.model.weight_init import trunc_normal_
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..blocks import WindowBlock, Work, moves
from ..checkpoints import StateDict
from ..converters import Fitted, Size, in_tokens
from ..layers import (
    EmbedPatches,
    LayerNorm2d,
    RelativeAttention,
    resize_axis_table,
    resize_position_table,
)
from ..policies import KeepRatios
from .arguments import table_size
from .base import GELU, init_layer
from .extents import ImgShapes
from .names import vitdet
from .plain import PlainBackbone
from .vit import IdleViTBlock
from .vit_shapes import shape_of

LAYER_NORM = dict(type='LN', eps=1e-6)
_PLAIN = dict(img_size=1024, patch_size=16, mlp_ratio=4, window_size=14)
_SHAPES = {
    'base': dict(_PLAIN, embed_dims=768, num_layers=12, num_heads=12),
    'large': dict(_PLAIN, embed_dims=1024, num_layers=24, num_heads=16),
    'huge': dict(_PLAIN, embed_dims=1280, num_layers=32, num_heads=16),
}
# The short names are mmpretrain's.
ARCHS: dict[str, dict[str, Any]] = {f'vitdet-{name}': shape for name, shape in _SHAPES.items()}
ARCHS |= _SHAPES | {name[0]: shape for name, shape in _SHAPES.items()}
_KEYS = ('embed_dims', 'num_layers', 'num_heads', 'feedforward_channels', 'global_attn_indexes')


class IdleViTDetBlock(WindowBlock, IdleViTBlock):
    """One block of ViTDet, within windows or among all active tokens of a map."""

    ATTENTION = RelativeAttention

    def computing(
        self, batch: int, hw_shape: tuple[int, int], rows: float, attending: float
    ) -> Work:
        work, attn = super().computing(batch, hw_shape, rows, attending), self.attn
        if not attending:
            return work
        # Windows are filled up, whoever is idle.
        queries, keys, sides = attending, attending / batch, sum(hw_shape)
        if side := attn.window_size:
            queries, keys, sides = batch * math.prod(hw_shape), side**2, 2 * side
        products = self.embed_dims * queries * (2 * keys + sides * attn.use_rel_pos)
        # Position biases are added up, and to the logits.
        added = moves(6 * attn.num_heads * queries * keys * attn.use_rel_pos, 8)
        return work._replace(pairs=products) + added


@MODELS.register_module()
class IdleViTDet(PlainBackbone):
    """ViTDet that computes only active tokens: mmpretrain's ``ViTSAM``, ``ViT`` of mmdet's project.

    It is one stage of ``num_layers`` blocks. Most of them attend within windows, the others to all
    active tokens of the map.

    Args:
        arch: Shape, one of ``vitdet-base``, ``vitdet-large`` and ``vitdet-huge``: what arguments
            are that are None here, ``pretrain_img_size``, ``policy`` and ``init_cfg`` apart. Or a
            dict with mmpretrain's keys.
        img_size: Image size in pixels that the relative position tables of blocks without windows
            are for; they are resized to each image.
        patch_size: Side of a token in pixels.
        window_size: Side of a window in tokens.
        window_block_indexes: Blocks that attend within windows; by default all but the last of each
            quarter.
        use_rel_pos: Whether there are relative position tables.
        pretrain_img_size: Image size in pixels of the absolute position table, which is resized to
            each image; that of ``img_size`` by default.
        pretrain_use_cls_token: Taken as mmdet's class has it, and without effect: the place of a
            class token is left out where weights are read.
        out_channels: Channels of SAM's reduction behind the blocks; 0 for none.
        single_output: Whether the first of the maps is returned alone, as by mmdet's class, and not
            a list.
        interpolate_mode: How the absolute position table is resized: a mode of torch's.
        policy: Its scope is ``map``.

    Further arguments, and errors, are those of ``PlainBackbone``.
    """

    family = 'vitdet'
    DENSE = (('mmpretrain', 'ViTSAM'), ('mmdet', 'ViT'))
    FORMATS = vitdet.FORMATS
    RENAMED = {'ViT': dict(embed_dim='embed_dims', depth='num_layers', in_chans='in_channels')}
    AS_DENSE = {('mmdet', 'ViT'): dict(single_output=True)}

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'vitdet-base',
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        in_channels: int = 3,
        embed_dims: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        window_size: int | None = None,
        window_block_indexes: Sequence[int] | None = None,
        use_rel_pos: bool = True,
        pretrain_img_size: int | tuple[int, int] | None = None,
        pretrain_use_cls_token: bool = True,
        out_channels: int = 0,
        out_indices: int | Sequence[int] = -1,
        single_output: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_cfg: dict = GELU,
        norm_cfg: dict = LAYER_NORM,
        interpolate_mode: str = 'bicubic',
        with_cp: bool = False,
        keep_ratios: KeepRatios = 1.0,
        policy: dict[str, Any] | None = None,
        idle_where: str = 'always',
        **kwargs: Any,
    ) -> None:
        shape = shape_of(
            arch if isinstance(arch, str) else _shape_by_keys(arch),
            ARCHS,
            img_size=img_size,
            patch_size=patch_size,
            embed_dims=embed_dims,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            window_size=window_size,
            window_block_indexes=window_block_indexes,
        )
        channels, depth, patch_size = shape['embed_dims'], shape['num_layers'], shape['patch_size']
        windowed = shape.setdefault('window_block_indexes', _in_quarters(depth))
        if not all(0 <= index < depth for index in windowed):
            raise ValueError(f'window_block_indexes={tuple(windowed)} must lie in 0 to {depth - 1}')
        super().__init__(shape, out_indices, **kwargs)
        self.interpolate_mode = interpolate_mode
        self.single_output = single_output
        patch = dict(kernel_size=patch_size, stride=patch_size)
        self.patch_embed = EmbedPatches(in_channels, channels, **patch)
        self.pos_shape = table_size(pretrain_img_size or shape['img_size'], patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, *self.pos_shape, channels))
        self.drop_after_pos = nn.Dropout(p=drop_rate)
        attention = dict(
            num_heads=shape['num_heads'],
            table_shape=table_size(shape['img_size'], patch_size),
            use_rel_pos=use_rel_pos,
            qkv_bias=qkv_bias,
            attn_drop_rate=attn_drop_rate,
        )
        hidden = int(shape['mlp_ratio'] * channels)
        feedforward = dict(
            feedforward_channels=hidden, ffn_drop=drop_rate, act_cfg=act_cfg, add_identity=False
        )
        self.layers = ModuleList(
            IdleViTDetBlock(
                channels,
                norm_cfg=norm_cfg,
                drop_path_rate=rate,
                attention=attention | dict(window_size=shape['window_size'] * (index in windowed)),
                feedforward=feedforward,
                policy=policy,
                with_cp=with_cp,
            )
            for index, rate in enumerate(torch.linspace(0, drop_path_rate, depth).tolist())
        )
        if out_channels:
            self.channel_reduction = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels, eps=1e-6),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels, eps=1e-6),
            )
        self.reduces = bool(out_channels)
        self.built(keep_ratios, idle_where)

    def forward(self, x: Tensor, img_shapes: ImgShapes = None) -> Any:
        """As ``IdleBackbone.forward``; the first map alone with ``single_output``."""
        outs = super().forward(x, img_shapes)
        return outs[0] if self.single_output else outs

    def fold_table(self, hw_shape: tuple[int, int]) -> None:
        """Resize all position tables for good, so that maps of this size need no resizing."""
        self.pos_embed = nn.Parameter(self._resized(hw_shape).detach().unflatten(1, hw_shape))
        self.pos_shape = hw_shape
        for layer in self.layers:
            layer.attn.fold_table(hw_shape)

    def _resized(self, hw_shape: tuple[int, int]) -> Tensor:
        table = self.pos_embed.flatten(1, 2)
        return resize_position_table(table, self.pos_shape, hw_shape, self.interpolate_mode)

    def _placed(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        return x + self._resized(hw_shape)

    def _output(self, index: int, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        out = super()._output(index, x, hw_shape)
        return self.channel_reduction(out) if self.reduces else out

    def _init_from_scratch(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            init_layer(module)

    def _frozen_modules(self) -> Iterable[nn.Module | nn.Parameter]:
        yield from super()._frozen_modules()
        if self.reduces and self.frozen_stages == len(self.layers):
            yield self.channel_reduction

    @classmethod
    def table_shapes(cls, state: StateDict, img_size: Size) -> dict[str, Size]:
        if 'pos_embed' not in state:
            return {}
        return {'pos_embed': in_tokens(img_size, state['patch_embed.projection.weight'].shape[-1])}

    @classmethod
    def fit_tables(
        cls, state: StateDict, shapes: Mapping[str, Size], window_size: int | None, is_foreign: bool
    ) -> Fitted:
        # Which relative tables are of windows names do not tell; they are resized where they load.
        return _fitted(state, shapes, {}, cls.TABLE_MODE)

    def _fit_tables(self, state: StateDict, is_foreign: bool) -> Fitted:
        own = self.state_dict()
        sides = {key: (len(own[key]) + 1) // 2 for key in own if '.attn.rel_pos_' in key}
        return _fitted(state, {'pos_embed': self.pos_shape}, sides, self.interpolate_mode)

    def dense_twin(self, cfg: Mapping[str, Any]) -> tuple[dict[str, Any], StateDict]:
        shape = self.shape
        if cfg.get('act_cfg', GELU) != GELU or self.pos_shape != table_size(
            shape['img_size'], shape['patch_size']
        ):
            raise ValueError(
                'backbone=IdleViTDet with another act_cfg than GELU or a pretrain_img_size of its '
                "own has no dense class: mmpretrain's ViTSAM has neither. Compare with "
                'keep_ratios=1.0 instead'
            )
        arch = {key: shape[key] for key in _KEYS[:3]}
        arch['feedforward_channels'] = int(shape['mlp_ratio'] * shape['embed_dims'])
        windowed = set(shape['window_block_indexes'])
        arch['global_attn_indexes'] = [i for i in range(len(self.layers)) if i not in windowed]
        settings = dict(out_channels=0, norm_cfg=LAYER_NORM) | dict(cfg)
        sizes = {key: shape[key] for key in ('img_size', 'patch_size', 'window_size')}
        settings |= dict(arch=arch, out_indices=list(self.out_indices), **sizes)
        return settings, self.state_dict()


def _in_quarters(depth: int) -> tuple[int, ...]:
    """Blocks but the last of each quarter."""
    last = {math.ceil(depth * part / 4) - 1 for part in range(1, 5)}
    return tuple(index for index in range(depth) if index not in last)


def _shape_by_keys(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Shape by mmpretrain's keys."""
    if lacking := [key for key in _KEYS if key not in arch]:
        raise ValueError(f'arch={dict(arch)!r} lacks {", ".join(lacking)}; all keys: {_KEYS}')
    shape = dict(_PLAIN, **{key: arch[key] for key in _KEYS[:3]})
    shape['mlp_ratio'] = arch['feedforward_channels'] / arch['embed_dims']
    depth, whole = arch['num_layers'], arch['global_attn_indexes']
    shape['window_block_indexes'] = tuple(i for i in range(depth) if i not in whole)
    return shape


def _fitted(
    state: StateDict, shapes: Mapping[str, Size], sides: Mapping[str, int], mode: str
) -> Fitted:
    """Resize absolute tables (1, H, W, C) by shape and relative ones by the side of their axis."""
    fitted = dict(state)
    for key, table in state.items():
        if key in shapes and table.dim() == 4 and tuple(table.shape[1:3]) != shapes[key]:
            size = table.shape[1], table.shape[2]
            places = resize_position_table(table.flatten(1, 2), size, shapes[key], mode)
            fitted[key] = places.unflatten(1, shapes[key])
        elif key in sides and table.dim() == 2:
            fitted[key] = resize_axis_table(table, sides[key])
    changed = (key for key in state if fitted[key] is not state[key])
    return Fitted(
        fitted, {key: (tuple(state[key].shape), tuple(fitted[key].shape)) for key in changed}
    )
