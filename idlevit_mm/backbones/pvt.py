"""Pyramid Vision Transformer v1 and v2 with idle tokens (arXiv 2102.12122, 2106.13797, 2310.05654).

Shape letters: B images, N tokens of a stage's map (H * W), T active tokens, C channels, A heads.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import ModuleList
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..blocks import IdleBlock, Tokens, Work, layers, moves
from ..checkpoints import StateDict
from ..converters import Fitted, Size, in_tokens
from ..kernels import backend_at
from ..layers import (
    AbsolutePositionEmbedding,
    EmbedPatches,
    MixFFN,
    SpatialReductionAttention,
    pad_to,
)
from ..policies import KeepRatios, Plan
from .arguments import table_size
from .base import GELU
from .names import pvt as names
from .normed import NormedBlock
from .pyramid import IdlePyramid

LAYER_NORM = dict(type='LN', eps=1e-6)
_TABLE = 'layers.{}.1.0.pos_embed'


class IdlePVTBlock(NormedBlock):
    """One PVT block on the active tokens of a map; all tokens serve as keys and values."""

    ATTENTION = SpatialReductionAttention
    reads_map = has_cells = True

    def __init__(self, embed_dims: int, feedforward: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(embed_dims, feedforward=feedforward, **kwargs)
        # All idle tokens are among the keys, so only the convolution has use for their summary.
        self.uses_summaries = feedforward.get('use_conv', False)

    def feed_forward(self, drop_path_rate: float, feedforward: dict[str, Any]) -> nn.Module:
        return MixFFN(self.embed_dims, drop_path_rate=drop_path_rate, **feedforward)

    def attend(self, tokens: Tokens, plan: Plan, keys: Tensor | None) -> tuple[Tensor, None]:
        context = queries = self.norm1(tokens.x)
        if plan.rows is not None:
            queries = backend_at(context).take(context, plan.rows)
            summaries = tokens.now[:, queries.shape[1] :]
            if summaries.shape[1]:
                queries = torch.cat([queries, self.norm1(summaries)], dim=1)
        return self.attn(queries, context, tokens.hw_shape), None

    def transform(self, now: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        layout = None if plan.summary is None else self.groups(hw_shape, now.device)
        cells = None if layout is None else layout.window_ids

        def function(x: Tensor) -> Tensor:
            return x + self.ffn(self.norm2(x), hw_shape, plan.rows, cells)

        if self.uses_summaries:
            return function(now)
        return self.by_tokens(function, now, self.norm2, self.ffn)

    def computing(
        self, batch: int, hw_shape: tuple[int, int], rows: float, attending: float
    ) -> Work:
        width, hidden, ratio = self.embed_dims, self.ffn.feedforward_channels, self.attn.sr_ratio
        # Where nobody attends, the map is not reduced.
        whole = math.prod(hw_shape) if attending else 0
        cells = math.prod(max(side // ratio, 1) for side in hw_shape) if attending else 0
        linear = layers(attending, (width, width), (width, width))
        linear += layers(rows, (width, hidden), (hidden, width))
        linear += layers(batch * cells, (width, 2 * width))
        if ratio > 1:
            linear += layers(batch * cells, (ratio**2 * width, width))
        taps = 9 if self.uses_summaries else 0
        pairs = attending * 2 * width * cells + rows * taps * hidden
        # The norm before the reduction is that of the whole map.
        numbers = attending * 6 * width + rows * (3 * width + (5 if taps else 2) * hidden)
        numbers += 2 * batch * whole * width
        return linear + Work(pairs=pairs) + moves(numbers, 10 if attending else 5)


@MODELS.register_module()
class IdlePyramidVisionTransformer(IdlePyramid):
    """Pyramid Vision Transformer of mmdet that computes only active tokens.

    A map smaller than a patch or a cell of the spatial reduction, which mmdet's class refuses, is
    padded with zeros.

    Args:
        pretrain_img_size: Image size in pixels of the position tables.
        embed_dims: Channels per attention head; a stage has ``embed_dims * num_heads`` channels.
        patch_sizes: Kernel size of the patch embedding of each stage.
        strides: Stride of the patch embedding of each stage.
        paddings: Padding of the patch embedding of each stage.
        sr_ratios: Spatial reduction of each stage: side of the cells, in tokens, that give one key.
        use_abs_pos_embed: Whether stages have a position table, resized to each image.
        norm_after_stage: Whether a norm follows each stage.
        use_conv_ffn: Whether feed-forward networks have a depth-wise convolution.

    Further arguments, and errors, are those of ``IdleBackbone``.
    """

    family = 'pvt'
    DENSE = (('mmdet', 'PyramidVisionTransformer'),)
    FORMATS = names.FORMATS
    TABLE_MODE = 'bilinear'

    def __init__(
        self,
        pretrain_img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        embed_dims: int = 64,
        num_stages: int = 4,
        num_layers: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        strides: Sequence[int] = (4, 2, 2, 2),
        paddings: Sequence[int] = (0, 0, 0, 0),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_abs_pos_embed: bool = True,
        norm_after_stage: bool = False,
        use_conv_ffn: bool = False,
        act_cfg: dict = GELU,
        norm_cfg: dict = LAYER_NORM,
        convert_weights: bool = True,
        with_cp: bool = False,
        keep_ratios: KeepRatios = 1.0,
        policy: dict[str, Any] | None = None,
        idle_where: str = 'always',
        **kwargs: Any,
    ) -> None:
        super().__init__(num_layers, out_indices, convert_weights=convert_weights, **kwargs)
        per_stage = dict(
            num_layers=num_layers,
            num_heads=num_heads,
            patch_sizes=patch_sizes,
            strides=strides,
            paddings=paddings,
            sr_ratios=sr_ratios,
            mlp_ratios=mlp_ratios,
        )
        for name, values in per_stage.items():
            if len(values) != num_stages:
                raise ValueError(f'{name}={values} must have num_stages={num_stages} entries')

        self.strides = tuple(strides)
        self.use_abs_pos_embed = use_abs_pos_embed
        # Sides in pixels of the smallest map that each patch embedding takes.
        self.least_sides = [
            patch - 2 * padding for patch, padding in zip(patch_sizes, paddings, strict=True)
        ]
        attention: dict[str, Any] = dict(
            attn_drop=attn_drop_rate, proj_drop=drop_rate, qkv_bias=qkv_bias, norm_cfg=norm_cfg
        )
        feedforward = dict(act_cfg=act_cfg, ffn_drop=drop_rate, use_conv=use_conv_ffn)
        settings: dict[str, Any] = dict(norm_cfg=norm_cfg, with_cp=with_cp, policy=policy)
        rates = iter(torch.linspace(0, drop_path_rate, sum(num_layers)).tolist())
        self.layers = ModuleList()
        for index in range(num_stages):
            channels = embed_dims * num_heads[index]
            patch_embed = EmbedPatches(
                in_channels,
                channels,
                kernel_size=patch_sizes[index],
                stride=strides[index],
                padding=paddings[index],
                norm_cfg=norm_cfg,
            )
            blocks = ModuleList()
            if use_abs_pos_embed:
                shape = table_size(pretrain_img_size, math.prod(patch_sizes[: index + 1]))
                blocks.append(AbsolutePositionEmbedding(shape, channels, drop_rate))
            attention |= dict(num_heads=num_heads[index], sr_ratio=sr_ratios[index])
            feedforward['feedforward_channels'] = mlp_ratios[index] * channels
            blocks.extend(
                IdlePVTBlock(
                    channels,
                    drop_path_rate=next(rates),
                    attention=attention,
                    feedforward=feedforward,
                    **settings,
                )
                for _ in range(num_layers[index])
            )
            norm = build_norm_layer(norm_cfg, channels)[1] if norm_after_stage else nn.Identity()
            # A plain list of parts gives the parameter names of mmdet: layers.<stage>.<part>.
            self.layers.append(ModuleList([patch_embed, blocks, norm]))
            in_channels = channels
        self.built(keep_ratios, idle_where)

    def _embedded(self, index: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        patch_embed, blocks, _ = self.layers[index]
        side = self.least_sides[index]
        x, hw_shape = patch_embed(pad_to(x, side, side))
        return (blocks[0](x, hw_shape) if self.use_abs_pos_embed else x), hw_shape

    def _makers(self, index: int) -> Sequence[nn.Module]:
        patch_embed, blocks, _ = self.layers[index]
        return [patch_embed, blocks[0]] if self.use_abs_pos_embed else [patch_embed]

    def _parts(self, index: int) -> tuple[Iterable[IdleBlock], nn.Module | None, nn.Module]:
        _, blocks, norm = self.layers[index]
        # Not a slice, which makes a new ModuleList, and which torch.compile cannot trace.
        first, *others = blocks
        return (others if self.use_abs_pos_embed else blocks), None, norm

    def _frozen_modules(self) -> Iterable[nn.Module]:
        if self.frozen_stages == 0:
            yield self.layers[0][0]
        yield from self.layers[: max(self.frozen_stages, 0)]

    @classmethod
    def table_shapes(cls, state: StateDict, img_size: Size) -> dict[str, Size]:
        shapes, stride, stage = {}, 1, 0
        while (table := _TABLE.format(stage)) in state:
            stride *= state[f'layers.{stage}.0.projection.weight'].shape[-1]
            shapes[table] = in_tokens(img_size, stride)
            stage += 1
        return shapes

    def _fit_tables(self, state: StateDict, is_foreign: bool) -> Fitted:
        shapes = {
            _TABLE.format(index): blocks[0].pos_shape
            for index, (_, blocks, _) in enumerate(self.layers)
            if isinstance(blocks[0], AbsolutePositionEmbedding)
        }
        return self.fit_tables(state, shapes, None, is_foreign)


@MODELS.register_module()
class IdlePyramidVisionTransformerV2(IdlePyramidVisionTransformer):
    """PVTv2 that computes only active tokens (arXiv 2106.13797).

    Arguments are those of ``IdlePyramidVisionTransformer`` except ``patch_sizes``, ``paddings``,
    ``use_abs_pos_embed``, ``norm_after_stage`` and ``use_conv_ffn``, which make the version.
    """

    DENSE = (('mmdet', 'PyramidVisionTransformerV2'),)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            patch_sizes=(7, 3, 3, 3),
            paddings=(3, 1, 1, 1),
            use_abs_pos_embed=False,
            norm_after_stage=True,
            use_conv_ffn=True,
            **kwargs,
        )
