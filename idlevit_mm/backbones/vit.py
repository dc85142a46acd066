"""Plain Vision Transformer with idle tokens (arXiv 2010.11929, 2012.12877, 2310.05654).

Shape letters: B images, N tokens of the map (H * W), P class tokens and registers behind the map, S
rows of both and of what a policy has appended, T computed rows, C channels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import ModuleList
from mmengine.model.weight_init import constant_init, kaiming_init, trunc_normal_
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import Tokens, Work, block_work, without_cells
from ..checkpoints import StateDict
from ..converters import Fitted, Size, fit_tables, in_tokens
from ..kernels import backend_at
from ..layers import ConvStemEmbed, EmbedPatches, SelfAttention, resize_position_table
from ..policies import KeepRatios, Plan
from ..registry import arguments_of
from .arguments import table_size
from .base import GELU
from .names import dinov2, vit
from .normed import NormedBlock
from .plain import PlainBackbone
from .vit_shapes import ARCHS, SCALE, check_dense, check_kind, shape_of


class IdleViTBlock(NormedBlock):
    """One block of a plain ViT on the active tokens of a map, the class token and registers.

    Args:
        *args: Those of ``NormedBlock``, as are further keyword arguments.
        residual_scale: Factor of both branches.
    """

    NORMS = ('ln1', 'ln2')
    ATTENTION: ClassVar[type[nn.Module]] = SelfAttention
    has_cells = True

    def __init__(self, *args: Any, residual_scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.residual_scale = residual_scale

    def attend(
        self, tokens: Tokens, plan: Plan, keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        idle = plan.keys == 'all' and plan.rows is not None
        now, context = self.ln1(tokens.now), self.ln1(tokens.x) if idle else None
        rows = tokens.pack.rows if tokens.pack is not None else None
        if plan.summary is not None:
            keys = None  # computed anew
            context = without_cells(now, plan, self.summary_size, self.num_class)
        elif keys is not None and context is None and rows is not None:
            keys = backend_at(keys).take(keys, rows)
        # The class token comes behind the computed rows of the map.
        count = math.prod(tokens.hw_shape) if plan.rows is None else plan.rows.ids.shape[1]
        branch, row = self.attn(now, context, keys, count if plan.ask else None)
        return self.residual_scale * branch, None if row is None else row[:, :count]

    def transform(self, now: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        def function(x: Tensor) -> Tensor:
            return x + self.residual_scale * self.ffn(self.ln2(x))

        return self.by_tokens(function, now, self.ln2, self.ffn)

    def class_query(
        self, x: Tensor, hw_shape: tuple[int, int], with_keys: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.attn.class_query(self.ln1(x), hw_shape[0] * hw_shape[1], with_keys)

    def computing(
        self, batch: int, hw_shape: tuple[int, int], rows: float, attending: float
    ) -> Work:
        hidden = self.ffn.feedforward_channels
        return block_work(self.embed_dims, hidden, rows, attending, attending / batch)


@MODELS.register_module()
class IdleVisionTransformer(PlainBackbone):
    """Plain Vision Transformer that computes only active tokens: DeiT, LV-ViT, DINOv2.

    It is one stage of ``num_layers`` blocks, mmseg's ``VisionTransformer``.

    Args:
        arch: Shape, one of ``deit-tiny``, ``deit-small``, ``deit-base``, ``lvvit-small``,
            ``lvvit-medium``, ``dinov2-small``, ``dinov2-base`` and ``dinov2-large``: what arguments
            are that are None here, ``policy`` and ``init_cfg`` apart.
        img_size: Image size in pixels of the position table, which is resized to each image.
        patch_size: Side of a token in pixels.
        stem: ``patch`` (one convolution) or ``conv`` (LV-ViT's three before it).
        residual_scale: Factor of both branches of a block (LV-ViT, arXiv 2104.10858: 1 / 2).
        layer_scale: What the learned factors of each channel of both branches (arXiv 2103.17239)
            begin with; 0 for none.
        with_cls_token: Whether there is a class token.
        num_registers: Tokens beside the class token (arXiv 2309.16588), always active and never
            counted. Where there are some, the class token has no place in the position table.
        output_cls_token: Whether each output is a list of the map and the class token (B, C).
        patch_norm: Whether the patch embedding has a norm.
        patch_bias: Whether the patch embedding has a bias.
        final_norm: Whether a norm follows the last block.
        interpolate_mode: How the position table is resized: a mode of torch's, or one with ``-aa``
            behind it, which smooths where the table shrinks.

    Further arguments, and errors, are those of ``PlainBackbone``.
    """

    family = 'vit'
    DENSE = (('mmseg', 'VisionTransformer'), ('mmpretrain', 'VisionTransformer'))
    FORMATS = (*vit.FORMATS, *dinov2.FORMATS)
    # mmpretrain's heads take class tokens, of whole images.
    AS_DENSE = {DENSE[1]: dict(output_cls_token=True, padded_images=False)}

    def __init__(
        self,
        arch: str = 'deit-small',
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        in_channels: int = 3,
        embed_dims: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        stem: str | None = None,
        residual_scale: float | None = None,
        layer_scale: float | None = None,
        out_indices: int | Sequence[int] = -1,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cls_token: bool = True,
        num_registers: int = 0,
        output_cls_token: bool = False,
        act_cfg: dict = GELU,
        norm_cfg: dict | None = None,
        patch_norm: bool = False,
        patch_bias: bool = True,
        final_norm: bool = True,
        interpolate_mode: str | None = None,
        with_cp: bool = False,
        keep_ratios: KeepRatios = 1.0,
        policy: dict[str, Any] | None = None,
        idle_where: str = 'always',
        **kwargs: Any,
    ) -> None:
        shape = shape_of(
            arch,
            ARCHS,
            img_size=img_size,
            patch_size=patch_size,
            embed_dims=embed_dims,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            stem=stem,
            residual_scale=residual_scale,
            layer_scale=layer_scale,
            num_registers=num_registers,
            norm_cfg=norm_cfg,
            interpolate_mode=interpolate_mode,
        )
        norm_cfg, patch_size = shape['norm_cfg'], shape['patch_size']
        channels, depth = shape['embed_dims'], shape['num_layers']
        super().__init__(shape, out_indices, **kwargs)
        besides = dict(output_cls_token=output_cls_token, num_registers=num_registers)
        for name, value in besides.items():
            if value and not with_cls_token:
                raise ValueError(f'{name}={value} needs with_cls_token=True')
        self.num_class = int(with_cls_token) + num_registers
        # Class tokens with a place in the position table.
        self.num_placed = int(with_cls_token and not num_registers)
        self.output_cls_token = output_cls_token
        self.interpolate_mode = shape['interpolate_mode']
        if shape['stem'] == 'conv':
            self.patch_embed = ConvStemEmbed(in_channels, channels, patch_size)
        else:
            patch = dict(kernel_size=patch_size, stride=patch_size, bias=patch_bias)
            patch_norm_cfg = norm_cfg if patch_norm else None
            self.patch_embed = EmbedPatches(in_channels, channels, norm_cfg=patch_norm_cfg, **patch)
        self.pos_shape = table_size(shape['img_size'], patch_size)
        places = self.num_placed + math.prod(self.pos_shape)
        if with_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, places, channels))
        self.drop_after_pos = nn.Dropout(p=drop_rate)
        attention = dict(attn_drop=attn_drop_rate, proj_drop=drop_rate, qkv_bias=qkv_bias)
        attention |= dict(num_heads=shape['num_heads'], layer_scale=shape['layer_scale'])
        hidden = int(shape['mlp_ratio'] * channels)
        feedforward = dict(feedforward_channels=hidden, ffn_drop=drop_rate, act_cfg=act_cfg)
        feedforward |= dict(layer_scale_init_value=shape['layer_scale'], add_identity=False)
        self.layers = ModuleList(
            IdleViTBlock(
                channels,
                norm_cfg=norm_cfg,
                drop_path_rate=rate,
                residual_scale=shape['residual_scale'],
                attention=attention,
                feedforward=feedforward,
                policy=policy,
                with_cp=with_cp,
                num_class=self.num_class,
            )
            for rate in torch.linspace(0, drop_path_rate, depth).tolist()
        )
        self.final_norm = final_norm
        if final_norm:
            self.ln1 = build_norm_layer(norm_cfg, channels)[1]
        self.built(keep_ratios, idle_where)

    def fold_table(self, hw_shape: tuple[int, int]) -> None:
        """Resize the position table for good, so that maps of this size need no resizing."""
        first = self.pos_embed[:, : self.num_placed]
        self.pos_embed = nn.Parameter(torch.cat([first, self._resized(hw_shape)], dim=1).detach())
        self.pos_shape = hw_shape

    def _placed(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self._resized(hw_shape)
        if not self.num_class:
            return x
        if self.num_placed:
            behind = self.cls_token + self.pos_embed[:, :1]
        else:
            behind = torch.cat([self.cls_token, self.register_tokens], dim=1)
        return torch.cat([x, behind.expand(x.shape[0], -1, -1)], dim=1)

    def _resized(self, hw_shape: tuple[int, int]) -> Tensor:
        table = self.pos_embed[:, self.num_placed :]
        return resize_position_table(table, self.pos_shape, hw_shape, self.interpolate_mode)

    def _output(self, index: int, x: Tensor, hw_shape: tuple[int, int]) -> Any:
        count = hw_shape[0] * hw_shape[1]
        # Rows behind the class token and registers are fused ones.
        x = x[:, : count + self.num_class]
        if self.final_norm and index == len(self.layers) - 1:
            x = self.ln1(x)
        out = super()._output(index, x, hw_shape)
        return [out, x[:, count]] if self.output_cls_token else out

    def _init_from_scratch(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        if self.num_class:
            trunc_normal_(self.cls_token, std=0.02)
        if self.num_class > 1:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=1e-6 if 'ffn' in name else 0.0)
            elif isinstance(module, nn.Conv2d):
                kaiming_init(module, mode='fan_in', bias=0.0)
            elif isinstance(module, (_BatchNorm, nn.LayerNorm)):
                constant_init(module, val=1.0, bias=0.0)

    def _frozen_modules(self) -> Iterable[nn.Module | nn.Parameter]:
        yield from super()._frozen_modules()
        if self.frozen_stages >= 0 and self.num_class:
            yield self.cls_token
        if self.frozen_stages >= 0 and self.num_class > 1:
            yield self.register_tokens

    @classmethod
    def table_shapes(cls, state: StateDict, img_size: Size) -> dict[str, Size]:
        if 'pos_embed' not in state:
            return {}
        # The stem of LV-ViT halves the image before the patches are embedded.
        stem = 2 if 'patch_embed.stem.0.weight' in state else 1
        stride = stem * state['patch_embed.projection.weight'].shape[-1]
        return {'pos_embed': in_tokens(img_size, stride)}

    @classmethod
    def fit_tables(
        cls, state: StateDict, shapes: Mapping[str, Size], window_size: int | None, is_foreign: bool
    ) -> Fitted:
        num_prefix = int('cls_token' in state and 'register_tokens' not in state)
        mode = 'bicubic-aa' if SCALE in state else 'bicubic'
        return fit_tables(state, shapes, mode, None, num_prefix, is_foreign)

    def _fit_tables(self, state: StateDict, is_foreign: bool) -> Fitted:
        check_kind(state, self.state_dict())
        # Files of timm and of releases are of square images.
        shapes, mode = {'pos_embed': self.pos_shape}, self.interpolate_mode
        return fit_tables(state, shapes, mode, None, self.num_placed, is_foreign)

    def dense_twin(self, cfg: Mapping[str, Any]) -> tuple[dict[str, Any], StateDict]:
        shape = dict(self.shape)
        check_dense(shape)
        # The dense class has other defaults.
        settings = {name: one.default for name, one in arguments_of(type(self)).items()}
        settings |= {**cfg, **shape, 'mlp_ratio': int(shape['mlp_ratio'])}
        settings['img_size'] = tuple(side * settings['patch_size'] for side in self.pos_shape)
        settings['out_indices'] = self.out_indices
        state = self.state_dict()
        if not self.num_class:
            # The dense class has a class token even then, and takes it out before the first block.
            state['cls_token'] = state['pos_embed'].new_zeros(1, 1, shape['embed_dims'])
            state['pos_embed'] = torch.cat([state['cls_token'], state['pos_embed']], dim=1)
        return settings, state
