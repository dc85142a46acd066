"""Swin Transformer with idle tokens (arXiv 2103.14030, arXiv 2310.05654).

Shape letters: B images, N tokens of a stage's map (H * W), T active tokens, C channels, A heads.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from mmengine.model.weight_init import trunc_normal_
from mmengine.registry import MODELS
from torch import nn

from ..blocks import IdleBlock, WindowBlock
from ..layers import MergePatches, ShiftWindowMSA
from ..ops import Units, map_units, window_units
from ..policies import KeepRatios
from .arguments import table_size
from .base import GELU, init_layer
from .names import swin as names
from .normed import NormedBlock
from .windowed import SwinBackbone, SwinStage

LAYER_NORM = dict(type='LN')


class IdleSwinBlock(WindowBlock, NormedBlock):
    """One Swin block on the active tokens of a map."""

    SCOPES: tuple[str, ...] = ('map', 'window_tokens', 'windows')
    ATTENTION: ClassVar[type[nn.Module]] = ShiftWindowMSA

    def units(self, hw_shape: tuple[int, int], scope: str, device: torch.device) -> Units:
        if scope == 'map':
            return map_units(*hw_shape, device)
        windows = self.attn.window_size, self.attn.shift_at(hw_shape)
        return window_units(*hw_shape, *windows, scope == 'windows', device)


@MODELS.register_module()
class IdleSwinTransformer(SwinBackbone):
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
        keep_ratios: KeepRatios = 1.0,
        policy: dict[str, Any] | None = None,
        idle_where: str = 'always',
        **kwargs: Any,
    ) -> None:
        super().__init__(depths, out_indices, **kwargs)
        if not len(depths) == len(num_heads) == len(strides):
            raise ValueError(
                f'depths={depths}, num_heads={num_heads} and strides={strides} '
                'must have one entry per stage'
            )
        if strides[0] != patch_size:
            raise ValueError(f'strides[0]={strides[0]} must equal patch_size={patch_size}')
        self.strides = tuple(strides)
        widths = self.num_features = self.widths(embed_dims, num_heads)
        self.window_size = window_size
        pos_shape = table_size(pretrain_img_size, patch_size) if use_abs_pos_embed else None
        merge_norm = norm_cfg if patch_norm else None
        self.put_embedding(in_channels, embed_dims, patch_size, merge_norm, pos_shape, drop_rate)

        attention = dict(
            window_size=window_size,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop_rate=attn_drop_rate,
            proj_drop_rate=drop_rate,
        )
        feedforward = dict(ffn_drop=drop_rate, act_cfg=act_cfg)
        shifts = 0, window_size // 2

        def block(index: int, place: int, rate: float) -> IdleSwinBlock:
            return IdleSwinBlock(
                widths[index],
                norm_cfg,
                rate,
                dict(attention, num_heads=num_heads[index], shift_size=shifts[place % 2]),
                dict(feedforward, feedforward_channels=int(mlp_ratio * widths[index])),
                with_cp=with_cp,
                policy=policy,
            )

        def stage(index: int, blocks: Iterable[IdleBlock]) -> SwinStage:
            merge = None
            if index < len(depths) - 1:
                options = dict(stride=strides[index + 1], norm_cfg=merge_norm)
                merge = MergePatches(widths[index], 2 * widths[index], **options)
            return SwinStage(blocks, merge)

        self.put_stages(block, stage, drop_path_rate, norm_cfg)
        self.built(keep_ratios, idle_where)

    def _init_from_scratch(self) -> None:
        if self.use_abs_pos_embed:
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        for module in self.modules():
            init_layer(module)

    def _frozen_modules(self) -> Iterable[nn.Module | nn.Parameter]:
        if self.frozen_stages >= 0:
            yield from (self.patch_embed, self.drop_after_pos)
            if self.use_abs_pos_embed:
                yield self.absolute_pos_embed
        for index in range(self.frozen_stages):
            yield self.stages[index]
            if index in self.out_indices:
                yield getattr(self, f'norm{index}')
