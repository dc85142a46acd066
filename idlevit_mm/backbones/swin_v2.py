"""Swin Transformer V2 with idle tokens (arXiv 2111.09883, arXiv 2310.05654).

Shape letters: B images, T active tokens, C channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.model.weight_init import trunc_normal_
from mmengine.registry import MODELS
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ..blocks import IdleBlock, Tokens, Work, moves
from ..checkpoints import StateDict
from ..layers import MergeThenNorm, ShiftCosineMSA
from ..layers.cosine_attention import HIDDEN
from ..policies import KeepRatios, Plan
from ..registry import arguments_of
from .arguments import check_numbers
from .base import GELU
from .names import swin_v2 as names
from .swin import LAYER_NORM, IdleSwinBlock, IdleSwinTransformer
from .windowed import SwinBackbone, SwinStage

_NUMBERS = 'embed_dims', 'depths', 'num_heads', 'extra_norm_every_n_blocks'
ARCHS = {
    'tiny': (96, (2, 2, 6, 2), (3, 6, 12, 24), 0),
    'small': (96, (2, 2, 18, 2), (3, 6, 12, 24), 0),
    'base': (128, (2, 2, 18, 2), (4, 8, 16, 32), 0),
    'large': (192, (2, 2, 18, 2), (6, 12, 24, 48), 0),
    'huge': (352, (2, 2, 18, 2), (8, 16, 32, 64), 6),
    'giant': (512, (2, 2, 42, 4), (16, 32, 64, 128), 6),
}
_MLP_RATIO = 4


class IdleSwinBlockV2(IdleSwinBlock):
    """One Swin V2 block on the active tokens of a map: norms come after the branches.

    Args:
        embed_dims: Channels of the tokens.
        extra_norm: Whether there is a norm after both branches, of active tokens alone.
        **kwargs: Further arguments of ``IdleSwinBlock``.
    """

    ATTENTION = ShiftCosineMSA

    def __init__(self, embed_dims: int, extra_norm: bool, **kwargs: Any) -> None:
        super().__init__(embed_dims, LAYER_NORM, **kwargs)
        for name in ('norm1', 'ffn', 'norm2'):  # in mmpretrain's order
            self.add_module(name, self._modules.pop(name))
        self.norm3 = nn.LayerNorm(embed_dims) if extra_norm else nn.Identity()

    def entering(self, x: Tensor) -> Tensor:
        return x

    def attend(self, tokens: Tokens, plan: Plan, keys: Tensor | None) -> tuple[Tensor, None]:
        return self.norm1(super().attend(tokens, plan, keys)[0]), None

    def transform(self, now: Tensor, hw_shape: tuple[int, int], plan: Plan) -> Tensor:
        def half(x: Tensor) -> Tensor:
            return self.norm3(x + self.norm2(self.ffn(x)))

        return self.by_tokens(half, now, self.norm2, self.ffn, self.norm3)

    def computing(
        self, batch: int, hw_shape: tuple[int, int], rows: float, attending: float
    ) -> Work:
        work = super().computing(batch, hw_shape, rows, attending)
        if not attending:
            return work
        steps, heads = (2 * self.attn.window_size - 1) ** 2, self.attn.w_msa.num_heads
        bias = Work(products=steps * HIDDEN * (2 + heads))
        # Lengths of queries and keys, and what is divided by them.
        lengths = moves(8 * self.embed_dims * attending, 14)
        return work + bias + lengths


class SwinStageV2(SwinStage):
    """The merge from the stage before, then blocks of one resolution."""

    def __init__(self, blocks: Iterable[IdleBlock], downsample: MergeThenNorm | None) -> None:
        super().__init__(blocks, downsample)
        self.add_module('blocks', self._modules.pop('blocks'))  # in mmpretrain's order


@MODELS.register_module()
class IdleSwinTransformerV2(SwinBackbone):
    """Swin Transformer V2 of mmpretrain that computes only active tokens.

    Args:
        arch: ``tiny``, ``small``, ``base``, ``large``, ``huge``, ``giant``, their first letters, or
            a dict of ``embed_dims``, ``depths``, ``num_heads`` and ``extra_norm_every_n_blocks``
            (0 for none).
        img_size: Image size in pixels of the absolute position table.
        patch_size: Side of a token of the first stage in pixels.
        window_size: Side of a window in tokens, or one for each stage.
        use_abs_pos_embed: Whether tokens get an absolute position table, resized to each image.
        interpolate_mode: How that table is resized.
        frozen_stages: Number of the last stage without gradients and in eval mode, the patch
            embedding included, as in mmpretrain: 0 freezes the first stage as well; -1 nothing.
        pad_small_map: Whether maps of one window or less are padded and shifted like others, which
            dense tasks need; mmpretrain's default is False, which refuses smaller maps and does
            not shift those of one window.
        norm_cfg: Norms of the outputs; None for none. All others are LayerNorm.
        pretrained_window_sizes: Side of the windows of each stage that position biases were
            learned with; 0 for ``window_size``. Weights fit windows of any size.
        policy: Its scopes are those of ``IdleSwinTransformer``.

    Further arguments, and errors, are those of ``IdleBackbone``.
    """

    family = 'swinv2'
    DENSE = (('mmpretrain', 'SwinTransformerV2'),)
    FORMATS = names.FORMATS

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        img_size: int | tuple[int, int] = 256,
        patch_size: int = 4,
        in_channels: int = 3,
        window_size: int | Sequence[int] = 8,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        use_abs_pos_embed: bool = False,
        interpolate_mode: str = 'bicubic',
        with_cp: bool = False,
        frozen_stages: int = -1,
        pad_small_map: bool = True,
        norm_cfg: dict | None = LAYER_NORM,
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
        keep_ratios: KeepRatios = 1.0,
        policy: dict[str, Any] | None = None,
        idle_where: str = 'always',
        **kwargs: Any,
    ) -> None:
        embed_dims, depths, num_heads, every = _numbers_of(arch)
        super().__init__(depths, out_indices, frozen_stages=frozen_stages, **kwargs)
        windows = [window_size] * len(depths) if isinstance(window_size, int) else window_size
        if len(windows) != len(depths) or len(pretrained_window_sizes) < len(depths):
            raise ValueError(
                f'window_size={window_size} and pretrained_window_sizes={pretrained_window_sizes} '
                f'must have one entry for each of {len(depths)} stages'
            )
        self.strides = patch_size, *[2] * (len(depths) - 1)
        widths = self.num_features = self.widths(embed_dims, num_heads)
        self.interpolate_mode = interpolate_mode
        height, width = (-(-int(side) // patch_size) for side in to_2tuple(img_size))
        pos_shape = (height, width) if use_abs_pos_embed else None
        self.put_embedding(in_channels, embed_dims, patch_size, LAYER_NORM, pos_shape, drop_rate)

        def block(index: int, place: int, rate: float) -> IdleSwinBlockV2:
            attention = dict(
                num_heads=num_heads[index],
                window_size=windows[index],
                shift_size=windows[index] // 2 if place % 2 else 0,
                attn_drop_rate=attn_drop_rate,
                pretrained_window_size=pretrained_window_sizes[index],
                pad_small_map=pad_small_map,
            )
            hidden = _MLP_RATIO * widths[index]
            return IdleSwinBlockV2(
                widths[index],
                bool(every) and (place + 1) % every == 0,
                drop_path_rate=rate,
                attention=attention,
                feedforward=dict(feedforward_channels=hidden, act_cfg=GELU, add_identity=False),
                with_cp=with_cp,
                policy=policy,
            )

        def stage(index: int, blocks: Iterable[IdleBlock]) -> SwinStageV2:
            return SwinStageV2(blocks, MergeThenNorm(widths[index - 1]) if index else None)

        self.put_stages(block, stage, drop_path_rate, norm_cfg)
        self.built(keep_ratios, idle_where)

    def merges(self) -> list[nn.Module | None]:
        return [stage.downsample for stage in self.stages]

    def dense_twin(self, cfg: Mapping[str, Any]) -> tuple[dict[str, Any], StateDict]:
        # The dense class has other defaults.
        defaults = {name: one.default for name, one in arguments_of(type(self)).items()}
        return {**defaults, **cfg}, self.state_dict()

    def _init_from_scratch(self) -> None:
        # All else is as constructors draw it.
        if self.use_abs_pos_embed:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def _frozen_modules(self) -> Iterable[nn.Module]:
        if self.frozen_stages >= 0:
            yield self.patch_embed
        for index, stage in enumerate(self.stages[: self.frozen_stages + 1]):
            yield stage
            if index in self.out_indices:
                yield getattr(self, f'norm{index}')


def _numbers_of(arch: str | Mapping[str, Any]) -> tuple[int, Sequence[int], Sequence[int], int]:
    """Those of an architecture in the order of ``_NUMBERS``; a ValueError says what is wrong."""
    if isinstance(arch, Mapping) and set(arch) == set(_NUMBERS):
        check_numbers(IdleSwinTransformer, arch)
        if len(arch['depths']) != len(arch['num_heads']):
            raise ValueError(f'arch={arch}: depths and num_heads must have one entry per stage')
        return tuple(arch[name] for name in _NUMBERS)
    found = [name for name in ARCHS if isinstance(arch, str) and arch.lower() in (name, name[0])]
    if not found:
        raise ValueError(
            f'arch={arch!r} is unknown; allowed: {", ".join(ARCHS)}, their first letters, or a '
            f'dict of {", ".join(_NUMBERS)}'
        )
    return ARCHS[found[0]]
