"""What PVT, PVTv2, MiT and Twins share: stages of patches, blocks, positions and a norm.

Shape letters: B images, N tokens of a stage's map (H * W), C channels.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence

from mmengine.model.weight_init import normal_init
from torch import Tensor, nn

from ..blocks import IdleBlock, Relay, run_blocks
from ..kernels import backend_at
from ..layers import AbsolutePositionEmbedding, makes_anew, to_map
from .base import IdleBackbone, init_layer
from .extents import Extents, ImgShapes


class IdlePyramid(IdleBackbone):
    """A backbone whose stages are alike."""

    def forward(self, x: Tensor, img_shapes: ImgShapes = None) -> tuple[Tensor, ...]:
        extents = Extents.of(self, x, img_shapes)
        outs, records, relay = [], [], Relay()
        for index, ratios in enumerate(self.keep_ratios):
            x, hw_shape = self._embedded(index, x)
            blocks, encode, norm = self._parts(index)
            makers = self._makers(index)
            owned = len(makers) > 0 and makes_anew(*makers)
            last = self.record_inputs, None, extents.at(index, hw_shape, x), relay, encode, owned
            (x,), record = run_blocks(blocks, x, hw_shape, ratios, *last)
            relay = relay.after
            records.append(record)
            x = to_map(backend_at(x).norm(x, norm), hw_shape)
            if index in self.out_indices:
                outs.append(x.contiguous())
        self.records = records
        return tuple(outs)

    @abstractmethod
    def _embedded(self, index: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, C) of a stage and (H, W), of the map before it (B, C, height, width)."""

    @abstractmethod
    def _parts(self, index: int) -> tuple[Iterable[IdleBlock], nn.Module | None, nn.Module]:
        """Of a stage its blocks, what encodes positions after the first, and its norm."""

    def _makers(self, index: int) -> Sequence[nn.Module]:
        """The layers that make the tokens of a stage, if they make new ones for sure."""
        return ()

    def _stages(self) -> Iterable[nn.Module]:
        return self.layers

    def _init_from_scratch(self) -> None:
        for module in self.modules():
            init_layer(module)
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                normal_init(module, 0, math.sqrt(2.0 / fan_out))
            elif isinstance(module, AbsolutePositionEmbedding):
                module.init_weights()
