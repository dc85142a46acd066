"""Twins-PCPVT and Twins-SVT with idle tokens (arXiv 2104.13840, 2310.05654).

Shape letters: B images, N tokens of a stage's map (H * W), C channels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import ModuleList
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..blocks import IdleBlock
from ..layers import ConditionalPositionEncoding, EmbedPatches, LocallyGroupedAttention
from ..policies import KeepRatios
from .base import GELU
from .names import twins as names
from .normed import NormedBlock
from .pvt import IdlePVTBlock
from .pyramid import IdlePyramid
from .swin import LAYER_NORM, IdleSwinBlock


class IdleGSABlock(IdlePVTBlock):
    """Global sub-sampled attention: PVT's block with a plain feed-forward network.

    Args:
        holds_summaries: Whether the next block has summaries of the same tokens.
    """

    def __init__(self, embed_dims: int, holds_summaries: bool, **kwargs: Any) -> None:
        super().__init__(embed_dims, **kwargs)
        self.holds_summaries = holds_summaries

    feed_forward = NormedBlock.feed_forward
    transform = NormedBlock.transform


class IdleLSABlock(IdleSwinBlock):
    """Locally grouped attention: Swin's block without shift and position bias."""

    SCOPES = ('map',)
    ATTENTION = LocallyGroupedAttention
    has_cells = True  # those of the blocks between


class _Twins(IdlePyramid):
    """What both have in common.

    Args:
        windows: Side of the windows of each stage in tokens; None for PCPVT.
        in_channels: Channels of the image.
        embed_dims: Channels of each stage.
        patch_sizes: Kernel size of the patch embedding of each stage; there may be more of them.
        strides: Stride of the patch embedding of each stage; there may be more of them.
        depths: Number of blocks of each stage.
        sr_ratios: Spatial reduction of each stage: side of the cells, in tokens, that give one key.
        out_indices: Stages whose maps are returned, all by default.
        norm_cfg: Norm layers of patch embeddings and of outputs; others are LayerNorm.
        norm_after_stage: Whether a norm follows each stage.

    Further arguments, and errors, are those of ``IdleBackbone``.
    """

    family = 'twins'
    FORMATS = names.FORMATS

    def __init__(
        self,
        windows: Sequence[int] | None,
        /,
        in_channels: int = 3,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        strides: Sequence[int] = (4, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[int] = (4, 4, 4, 4),
        out_indices: Sequence[int] = (),
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: dict = LAYER_NORM,
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        norm_after_stage: bool = False,
        act_cfg: dict = GELU,
        with_cp: bool = False,
        keep_ratios: KeepRatios = 1.0,
        policy: dict[str, Any] | None = None,
        idle_where: str = 'always',
        **kwargs: Any,
    ) -> None:
        out_indices = out_indices or range(len(depths))
        super().__init__(depths, out_indices, **kwargs)
        per_stage = dict(
            embed_dims=embed_dims,
            patch_sizes=patch_sizes,
            strides=strides,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            windiow_sizes=depths if windows is None else windows,
        )
        for name, values in per_stage.items():
            # mmseg's SVT has three stages by default, and four of these.
            known = values[: len(depths)] if name in ('patch_sizes', 'strides') else values
            if len(known) != len(depths):
                raise ValueError(f'{name}={values} must have an entry for each of depths={depths}')
        if any(width % heads for width, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(f'num_heads={num_heads} must divide embed_dims={embed_dims}')
        self.strides = tuple(strides[: len(depths)])

        self.patch_embeds = ModuleList()
        self.position_encoding_drops = ModuleList()
        self.layers = ModuleList()
        self.position_encodings = ModuleList()
        self.norm_list = ModuleList()
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        for index, depth in enumerate(depths):
            channels = embed_dims[index]
            patch = dict(kernel_size=patch_sizes[index], stride=strides[index])
            self.patch_embeds.append(
                EmbedPatches(in_channels, channels, norm_cfg=norm_cfg, **patch)
            )
            self.position_encoding_drops.append(nn.Dropout(drop_rate))
            self.position_encodings.append(ConditionalPositionEncoding(channels))
            in_channels = channels
            attention = dict(num_heads=num_heads[index], qkv_bias=qkv_bias)
            drops = dict(attn_drop=attn_drop_rate, proj_drop=drop_rate)
            globally = dict(attention, sr_ratio=sr_ratios[index], norm_cfg=LAYER_NORM, **drops)
            locally = attention | {f'{name}_rate': rate for name, rate in drops.items()}
            hidden = int(mlp_ratios[index] * channels)
            settings: dict[str, Any] = dict(
                feedforward=dict(feedforward_channels=hidden, act_cfg=act_cfg, ffn_drop=drop_rate),
                norm_cfg=LAYER_NORM,
                with_cp=with_cp,
                policy=policy,
            )
            blocks: list[IdleBlock] = []
            for place in range(depth):
                rate = next(rates)
                # mmseg drops paths twice in a row, but those of local attention.
                settings['drop_path_rate'] = 1 - (1 - rate) ** 2
                if windows is None or place % 2:
                    settings['attention'] = globally
                    blocks.append(IdleGSABlock(channels, windows is None, **settings))
                else:
                    size = dict(window_size=windows[index], drop_path_rate=rate)
                    settings['attention'] = locally | size
                    blocks.append(IdleLSABlock(channels, **settings))
            self.layers.append(ModuleList(blocks))
            norm = build_norm_layer(norm_cfg, channels)[1] if norm_after_stage else nn.Identity()
            self.norm_list.append(norm)
        self.built(keep_ratios, idle_where)

    def _embedded(self, index: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, hw_shape = self.patch_embeds[index](x)
        return self.position_encoding_drops[index](x), hw_shape

    def _parts(self, index: int) -> tuple[Iterable[IdleBlock], nn.Module, nn.Module]:
        return self.layers[index], self.position_encodings[index], self.norm_list[index]

    def _frozen_modules(self) -> Iterable[nn.Module]:
        if self.frozen_stages >= 0:
            yield self.patch_embeds[0]
        for index in range(self.frozen_stages):
            yield self.patch_embeds[index]
            yield self.position_encoding_drops[index]
            yield from self._parts(index)


@MODELS.register_module()
class IdlePCPVT(_Twins):
    """Twins-PCPVT of mmseg that computes only active tokens.

    The convolution that encodes positions after the first block of a stage sees all tokens.

    Args:
        **kwargs: Those of ``_Twins``: ``embed_dims``, ``patch_sizes``, ``strides``, ``num_heads``,
            ``mlp_ratios``, ``depths`` and ``sr_ratios`` of each stage (side of the cells, in
            tokens, that give one key), ``out_indices``, ``norm_cfg`` of patch embeddings and
            outputs, ``norm_after_stage``, and those of ``IdleBackbone``.
    """

    DENSE = (('mmseg', 'PCPVT'),)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(None, **kwargs)


@MODELS.register_module()
class IdleSVT(_Twins):
    """Twins-SVT of mmseg that computes only active tokens.

    Its blocks attend in windows and to the reduced map in turn. In both tokens of the whole map
    compete.

    Args:
        windiow_sizes: Side of the windows of each stage in tokens, by the name that mmseg has for
            it.
        **kwargs: Further arguments of ``IdlePCPVT``.
    """

    DENSE = (('mmseg', 'SVT'),)

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256),
        num_heads: Sequence[int] = (1, 2, 4),
        mlp_ratios: Sequence[int] = (4, 4, 4),
        drop_path_rate: float = 0.2,
        depths: Sequence[int] = (4, 4, 4),
        sr_ratios: Sequence[int] = (4, 2, 1),
        windiow_sizes: Sequence[int] = (7, 7, 7),
        norm_after_stage: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            windiow_sizes,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            drop_path_rate=drop_path_rate,
            depths=depths,
            sr_ratios=sr_ratios,
            norm_after_stage=norm_after_stage,
            **kwargs,
        )
