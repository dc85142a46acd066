"""What plain vision transformers share: one map, one stage of blocks.

Shape letters: B images, N tokens of the map (H * W), S rows of the map and of what is behind it, C
channels.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..blocks import run_blocks
from ..layers import to_map
from .base import IdleBackbone
from .extents import Extents, ImgShapes


class PlainBackbone(IdleBackbone):
    """One stage of blocks, ``layers``, on the map that ``patch_embed`` makes.

    Args:
        shape: What ``arch`` and the arguments that override it come to, by argument.
        out_indices: Blocks whose maps are returned; one number or several, -1 for the last.
        **kwargs: Further arguments of ``IdleBackbone``.
    """

    def __init__(
        self, shape: dict[str, Any], out_indices: int | Iterable[int], /, **kwargs: Any
    ) -> None:
        depth = shape['num_layers']
        given = (out_indices,) if isinstance(out_indices, int) else out_indices
        indices = [depth - 1 if index == -1 else index for index in given]
        super().__init__((depth,), indices, **kwargs)
        self.shape, self.strides = shape, (shape['patch_size'],)

    def forward(self, x: Tensor, img_shapes: ImgShapes = None) -> Any:
        extents = Extents.of(self, x, img_shapes)
        x, hw_shape = self.patch_embed(x)
        x = self.drop_after_pos(self._placed(x, hw_shape))
        taps = {i: partial(self._output, i, hw_shape=hw_shape) for i in self.out_indices}
        last = self.record_inputs, taps, extents.at(0, hw_shape, x)
        outs, record = run_blocks(self.layers, x, hw_shape, self.keep_ratios[0], *last)
        self.records = [record]
        return tuple(outs)

    def _placed(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) with their places added, and with what comes behind them: (B, S, C)."""
        raise NotImplementedError

    def _output(self, index: int, x: Tensor, hw_shape: tuple[int, int]) -> Any:
        """What is returned of a block's tokens (B, S, C)."""
        return to_map(x[:, : hw_shape[0] * hw_shape[1]], hw_shape).contiguous()

    def _stages(self) -> Iterable[nn.Module]:
        return [self.layers]

    def _frozen_modules(self) -> Iterable[nn.Module | nn.Parameter]:
        if self.frozen_stages >= 0:
            yield from (self.patch_embed, self.drop_after_pos, self.pos_embed)
        yield from self.layers[: max(self.frozen_stages, 0)]
