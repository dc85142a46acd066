"""Swin Transformer with idle tokens (arXiv 2103.14030, arXiv 2310.05654).

Shape letters: B images, N tokens of a stage's map (H * W), T active tokens, C channels, A heads.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import PatchEmbed
from mmengine.model import BaseModule, ModuleList
from mmengine.model.weight_init import constant_init, trunc_normal_, trunc_normal_init
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..blocks import (
    IdleBlock,
    Relay,
    StageRecord,
    Tokens,
    Work,
    layers,
    moves,
    run_blocks,
    weighted_mean,
)
from ..checkpoints import StateDict
from ..converters import Fitted, Size, in_tokens
from ..kernels import backend_at
from ..layers import FeedForward, MergePatches, ShiftWindowMSA, resize_position_table, to_map
from ..ops import Extent, Rows, Units, WindowLayout, map_units, window_layout, window_units
from ..policies import KeepRatios, Plan
from .arguments import table_size
from .base import GELU, IdleBackbone
from .extents import Extents, ImgShapes
from .names import swin as names

LAYER_NORM = dict(type='LN')


class IdleSwinBlock(IdleBlock):
    """One Swin block on the active tokens of a map."""

    SCOPES = ('map', 'window_tokens', 'windows')

    def __init__(
        self,
        embed_dims: int,
        norm_cfg: dict,
        drop_path_rate: float,
        attention: dict[str, Any],
        feedforward: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dims, **kwargs)
        drop_path = dict(type='DropPath', drop_prob=drop_path_rate)
        self.norm1 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.attn = ShiftWindowMSA(embed_dims, drop_path_rate=drop_path_rate, **attention)
        self.norm2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = FeedForward(embed_dims, dropout_layer=drop_path, **feedforward)

    def attend(self, tokens: Tokens, plan: Plan, keys: Tensor | None) -> tuple[Tensor, None]:
        idle = plan.keys == 'all' and plan.rows is not None
        context = self.norm1(tokens.x) if idle else None
        padding = self.norm1.bias if plan.pads_first else None
        now = self.norm1(tokens.now)
        return self.attn(now, tokens.hw_shape, plan.rows, context, padding), None

    def transform(self, now: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        return self.by_tokens(lambda x: self.ffn(self.norm2(x), x), now, self.norm2, self.ffn)

    def planned(self, *args: Any) -> tuple[Plan, Any]:
        plan, state = super().planned(*args)
        # Windows of the next block hold other tokens, and their summaries mean others.
        return (plan if plan.summary is None else plan.but(hold=False)), state

    def units(self, hw_shape: tuple[int, int], scope: str, device: torch.device) -> Units:
        if scope == 'map':
            return map_units(*hw_shape, device)
        windows = self.attn.window_size, self.attn.shift_size
        return window_units(*hw_shape, *windows, scope == 'windows', device)

    def mean_query(self, x: Tensor, hw_shape: tuple[int, int], extent: Extent | None) -> Tensor:
        return self.attn.w_msa.mean_query_attention(self.norm1(x), hw_shape, extent)

    def kept_share(self, x: Tensor, hw_shape: tuple[int, int], mask: Tensor) -> Tensor:
        return self.attn.kept_share(self.norm1(x), hw_shape, mask)

    def summarize(self, x: Tensor, weights: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Weighted mean of the idle tokens of each window: (B, M, C)."""
        layout = self._windows(hw_shape, x.device)
        slots = layout.token_ids.flatten().expand(x.shape[0], -1)
        tokens = backend_at(x).take(x, Rows(slots, padded=layout.has_padding))
        tokens = tokens.unflatten(1, layout.token_ids.shape)
        # Padding has weight 0, whatever was read there.
        return weighted_mean(tokens, F.pad(weights, (0, 1))[:, layout.token_ids])

    def spread(self, summaries: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        layout = self._windows(hw_shape, summaries.device)
        return summaries[:, layout.slot_ids // layout.token_ids.shape[1]]

    def computing(self, batch: int, hw_shape: tuple[int, int], rows: float) -> Work:
        width, hidden = self.embed_dims, self.ffn.feedforward_channels
        # Keys of a query: what is active of its window.
        keys = self.attn.window_size**2 * rows / (batch * math.prod(hw_shape))
        linear = layers(rows, (width, 3 * width), (width, width), (width, hidden), (hidden, width))
        return (
            linear + Work(pairs=2 * width * rows * keys) + moves(rows * (9 * width + 2 * hidden), 8)
        )

    def _windows(self, hw_shape: tuple[int, int], device: torch.device) -> WindowLayout:
        return window_layout(*hw_shape, self.attn.window_size, self.attn.shift_size, device)


class IdleSwinStage(BaseModule):
    """Blocks of one resolution, then the merge to the next, which the last stage lacks."""

    def __init__(self, blocks: Iterable[IdleSwinBlock], downsample: MergePatches | None) -> None:
        super().__init__()
        self.blocks = ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, StageRecord]:
        """Run the blocks on the map x (B, N, C); further arguments are those of ``run_blocks``."""
        (x,), record = run_blocks(self.blocks, x, *args, **kwargs)
        return x, record


@MODELS.register_module()
class IdleSwinTransformer(IdleBackbone):
    """Swin Transformer of mmdet and mmseg that computes only active tokens.

    Args:
        pretrain_img_size: Image size in pixels of the absolute position table.
        embed_dims: Channels of the first stage; they double with each stage.
        patch_size: Side of a token of the first stage in pixels.
        window_size: Side of a window in tokens.
        strides: Stride of the patch embedding and of each merge.
        qk_scale: Factor of the attention logits; None means ``head channels ** -0.5``.
        patch_norm: Whether patch embedding and merges have a norm.
        use_abs_pos_embed: Whether tokens get an absolute position table, resized to each image.
        policy: Its scopes are ``map`` (best tokens of the whole map), ``window_tokens`` (best
            tokens of each window) and ``windows`` (best windows).

    Further arguments, and errors, are those of ``IdleBackbone``.
    """

    family = 'swin'
    DENSE = (('mmdet', 'SwinTransformer'), ('mmseg', 'SwinTransformer'))
    FORMATS = names.FORMATS

    def __init__(
        self,
        pretrain_img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        embed_dims: int = 96,
        patch_size: int = 4,
        window_size: int = 7,
        mlp_ratio: float = 4,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        strides: Sequence[int] = (4, 2, 2, 2),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_abs_pos_embed: bool = False,
        act_cfg: dict = GELU,
        norm_cfg: dict = LAYER_NORM,
        with_cp: bool = False,
        pretrained: str | None = None,
        convert_weights: bool = False,
        frozen_stages: int = -1,
        keep_ratios: KeepRatios = 1.0,
        policy: dict[str, Any] | None = None,
        idle_where: str = 'always',
        padded_images: bool = True,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(depths, out_indices, frozen_stages, convert_weights, pretrained, init_cfg)
        if not len(depths) == len(num_heads) == len(strides):
            raise ValueError(
                f'depths={depths}, num_heads={num_heads} and strides={strides} '
                'must have one entry per stage'
            )
        if strides[0] != patch_size:
            raise ValueError(f'strides[0]={strides[0]} must equal patch_size={patch_size}')
        self.strides, self.padded_images = tuple(strides), padded_images
        self.num_features = [embed_dims * 2**index for index in range(len(depths))]
        for channels, heads in zip(self.num_features, num_heads, strict=True):
            if channels % heads:
                raise ValueError(
                    f'num_heads={num_heads} must divide the channels of the stages, '
                    f'{self.num_features} with embed_dims={embed_dims}'
                )
        self.window_size = window_size
        self.use_abs_pos_embed = use_abs_pos_embed
        patch_norm_cfg = norm_cfg if patch_norm else None
        patch = dict(kernel_size=patch_size, stride=patch_size)
        self.patch_embed = PatchEmbed(in_channels, embed_dims, norm_cfg=patch_norm_cfg, **patch)
        if use_abs_pos_embed:
            self.pos_shape = table_size(pretrain_img_size, patch_size)
            table = torch.zeros(1, math.prod(self.pos_shape), embed_dims)
            self.absolute_pos_embed = nn.Parameter(table)
        self.drop_after_pos = nn.Dropout(p=drop_rate)

        attention = dict(
            window_size=window_size,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop_rate=attn_drop_rate,
            proj_drop_rate=drop_rate,
        )
        feedforward = dict(ffn_drop=drop_rate, act_cfg=act_cfg)
        settings: dict[str, Any] = dict(norm_cfg=norm_cfg, with_cp=with_cp, policy=policy)
        shifts = 0, window_size // 2
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = ModuleList()
        for index, (channels, depth) in enumerate(zip(self.num_features, depths, strict=True)):
            merge = None
            if index < len(depths) - 1:
                stride = strides[index + 1]
                merge = MergePatches(channels, 2 * channels, stride=stride, norm_cfg=patch_norm_cfg)
            attention['num_heads'] = num_heads[index]
            feedforward['feedforward_channels'] = int(mlp_ratio * channels)
            blocks = [
                IdleSwinBlock(
                    channels,
                    drop_path_rate=next(rates),
                    attention=dict(attention, shift_size=shifts[block % 2]),
                    feedforward=feedforward,
                    **settings,
                )
                for block in range(depth)
            ]
            self.stages.append(IdleSwinStage(blocks, merge))
        for index in out_indices:
            norm = build_norm_layer(norm_cfg, self.num_features[index])[1]
            self.add_module(f'norm{index}', norm)
        self.built(keep_ratios, idle_where)

    def forward(self, x: Tensor, img_shapes: ImgShapes = None) -> tuple[Tensor, ...]:
        """Maps (B, C, H, W) of images (B, 3, height, width), one for each of ``out_indices``.

        ``img_shapes`` are heights and widths in pixels of images that are padded, if known.
        """
        extents = Extents.of(self, x, img_shapes)
        x, hw_shape = self.patch_embed(x)
        if self.use_abs_pos_embed:
            x = x + self._resized(hw_shape)
        x = self.drop_after_pos(x)
        outs, records, relay = [], [], Relay()
        for index, (stage, ratios) in enumerate(zip(self.stages, self.keep_ratios, strict=True)):
            last = self.record_inputs, None, extents.at(index, hw_shape, x), relay
            x, record = stage(x, hw_shape, ratios, *last)
            relay = relay.after
            records.append(record)
            if index in self.out_indices:
                norm = getattr(self, f'norm{index}')
                outs.append(to_map(norm(x), hw_shape).contiguous())
            if stage.downsample is not None:
                x, hw_shape = stage.downsample(x, hw_shape)
        self.records = records
        return tuple(outs)

    def fold_table(self, hw_shape: tuple[int, int]) -> None:
        """Resize the absolute position table, if there is one, for good."""
        if self.use_abs_pos_embed:
            self.absolute_pos_embed = nn.Parameter(self._resized(hw_shape).detach())
            self.pos_shape = hw_shape

    def _resized(self, hw_shape: tuple[int, int]) -> Tensor:
        return resize_position_table(
            self.absolute_pos_embed, self.pos_shape, hw_shape, mode='bicubic'
        )

    def _stages(self) -> Iterable[nn.Module]:
        return self.stages

    def _init_from_scratch(self) -> None:
        if self.use_abs_pos_embed:
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02, bias=0.0)
            elif isinstance(module, nn.LayerNorm):
                constant_init(module, 1.0)

    def _frozen_modules(self) -> Iterable[nn.Module | nn.Parameter]:
        if self.frozen_stages >= 0:
            yield from (self.patch_embed, self.drop_after_pos)
            if self.use_abs_pos_embed:
                yield self.absolute_pos_embed
        for index in range(self.frozen_stages):
            yield self.stages[index]
            if index in self.out_indices:
                yield getattr(self, f'norm{index}')

    @classmethod
    def table_shapes(cls, state: StateDict, img_size: Size) -> dict[str, Size]:
        if 'absolute_pos_embed' not in state:
            return {}
        stride = state['patch_embed.projection.weight'].shape[-1]
        return {'absolute_pos_embed': in_tokens(img_size, stride)}

    def _fit_tables(self, state: StateDict, is_foreign: bool) -> Fitted:
        shapes = {'absolute_pos_embed': self.pos_shape} if self.use_abs_pos_embed else {}
        return self.fit_tables(state, shapes, self.window_size, is_foreign)
