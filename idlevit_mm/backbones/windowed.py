"""What both versions of Swin have in common.

Shape letters: B images, N tokens of a stage's map (H * W), C channels.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from ..blocks import IdleBlock, Relay, StageRecord, run_blocks
from ..checkpoints import StateDict
from ..converters import Fitted, Size, in_tokens
from ..kernels import backend_at, is_plain
from ..layers import EmbedPatches, MergePatches, makes_anew, resize_position_table, to_map
from .base import IdleBackbone
from .extents import Extents, ImgShapes


class SwinStage(BaseModule):
    """Blocks of one resolution, and the merge to the next, or from the one before, if any."""

    def __init__(self, blocks: Iterable[IdleBlock], downsample: MergePatches | None) -> None:
        super().__init__()
        self.blocks = ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, StageRecord]:
        """Run the blocks on the map x (B, N, C); further arguments are those of ``run_blocks``."""
        (x,), record = run_blocks(self.blocks, x, *args, **kwargs)
        return x, record


class SwinBackbone(IdleBackbone):
    """What both versions of Swin have in common."""

    interpolate_mode = 'bicubic'
    # Side of the windows whose position biases are tables; None without such tables.
    window_size: int | None = None

    def put_embedding(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        norm_cfg: dict | None,
        pos_shape: Size | None,
        drop_rate: float,
    ) -> None:
        """Add the patch embedding, and an absolute position table of a shape in tokens, if any."""
        patch = dict(kernel_size=patch_size, stride=patch_size)
        self.patch_embed = EmbedPatches(in_channels, embed_dims, norm_cfg=norm_cfg, **patch)
        self.use_abs_pos_embed = pos_shape is not None
        if pos_shape is not None:
            self.pos_shape = pos_shape
            table = torch.zeros(1, math.prod(pos_shape), embed_dims)
            self.absolute_pos_embed = nn.Parameter(table)
        self.drop_after_pos = nn.Dropout(p=drop_rate)

    def widths(self, embed_dims: int, num_heads: Sequence[int]) -> list[int]:
        """Channels of the stages; a ValueError says which heads do not divide them."""
        found = [embed_dims * 2**index for index in range(len(self.depths))]
        for channels, heads in zip(found, num_heads, strict=True):
            if channels % heads:
                raise ValueError(
                    f'num_heads={num_heads} must divide the channels of the stages, '
                    f'{found} with embed_dims={embed_dims}'
                )
        return found

    def put_stages(
        self,
        block: Callable[[int, int, float], IdleBlock],
        stage: Callable[[int, Iterable[IdleBlock]], SwinStage],
        drop_path_rate: float,
        norm_cfg: dict | None,
    ) -> None:
        """Add the stages and the norms of the outputs, from where they are, and their parts.

        A block is known by the numbers of its stage and place and by its rate.
        """
        rates = iter(torch.linspace(0, drop_path_rate, sum(self.depths)).tolist())
        self.stages = ModuleList(
            stage(index, (block(index, place, next(rates)) for place in range(depth)))
            for index, depth in enumerate(self.depths)
        )
        for index in self.out_indices:
            width = self.num_features[index]
            norm = build_norm_layer(norm_cfg, width)[1] if norm_cfg else nn.Identity()
            self.add_module(f'norm{index}', norm)

    def forward(self, x: Tensor, img_shapes: ImgShapes = None) -> tuple[Tensor, ...]:
        extents = Extents.of(self, x, img_shapes)
        x, hw_shape = self.patch_embed(x)
        if self.use_abs_pos_embed:
            x = x + self._resized(hw_shape)
        x = self.drop_after_pos(x)
        outs, records, relay = [], [], Relay()
        parts = zip(self.merges(), self.stages, self.keep_ratios, strict=True)
        for index, (merge, stage, ratios) in enumerate(parts):
            if merge is not None:
                x, hw_shape = merge(x, hw_shape)
            makers = [self.patch_embed, self.drop_after_pos] if merge is None else [merge]
            owned = is_plain(stage, SwinStage) and makes_anew(*makers)
            # By their places: mmengine's recomputation passes on no arguments by name.
            last = self.record_inputs, None, extents.at(index, hw_shape, x), relay, None, owned
            x, record = stage(x, hw_shape, ratios, *last)
            relay = relay.after
            records.append(record)
            if index in self.out_indices:
                norm = getattr(self, f'norm{index}')
                outs.append(to_map(backend_at(x).norm(x, norm), hw_shape).contiguous())
        self.records = records
        return tuple(outs)

    def merges(self) -> list[nn.Module | None]:
        """What comes before each stage."""
        return [None, *[stage.downsample for stage in self.stages]][:-1]

    def fold_table(self, hw_shape: tuple[int, int]) -> None:
        """Resize the absolute position table, if there is one, for good."""
        if self.use_abs_pos_embed:
            self.absolute_pos_embed = nn.Parameter(self._resized(hw_shape).detach())
            self.pos_shape = hw_shape

    def _resized(self, hw_shape: tuple[int, int]) -> Tensor:
        return resize_position_table(
            self.absolute_pos_embed, self.pos_shape, hw_shape, self.interpolate_mode
        )

    def _stages(self) -> Iterable[nn.Module]:
        return self.stages

    @classmethod
    def table_shapes(cls, state: StateDict, img_size: Size) -> dict[str, Size]:
        if 'absolute_pos_embed' not in state:
            return {}
        stride = state['patch_embed.projection.weight'].shape[-1]
        return {'absolute_pos_embed': in_tokens(img_size, stride)}

    def _fit_tables(self, state: StateDict, is_foreign: bool) -> Fitted:
        shapes = {'absolute_pos_embed': self.pos_shape} if self.use_abs_pos_embed else {}
        return self.fit_tables(state, shapes, self.window_size, is_foreign)
