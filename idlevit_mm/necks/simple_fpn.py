"""A feature pyramid from one map (ViTDet, arXiv 2203.16527, section 3).

Shape letters: B images, C channels of the backbone, D of the pyramid, H and W of the map.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import LayerNorm2d  # noqa: F401  (registers LN2d)

SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
LAYER_NORM_2D = dict(type='LN2d', eps=1e-6)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Makes a pyramid of the last map of a plain backbone (ViTDet, arXiv 2203.16527).

    Factor 4 is two transposed 2x2 convolutions of stride 2, with norm and GELU between them, which
    halve the channels each; 2 is one of them; 1 is the map itself; 0.5 is 2x2 max pooling, which
    counts an odd last row or column as a cell. A 1x1 and a 3x3 convolution, each with its norm,
    follow in every level. Levels beyond the factors take every second pixel of the level before.

    Args:
        in_channels: Channels C of the backbone's map.
        out_channels: Channels D of every level.
        scale_factors: Size of each level against the map: a decreasing choice of 4, 2, 1 and 0.5.
        num_outs: Number of levels; as many as ``scale_factors`` when None.
        norm_cfg: Norm between transposed convolutions and after convolutions, which have a bias
            where it is None. By default LayerNorm over channels.
        init_cfg: How mmengine draws new weights.

    Raises:
        ValueError: A number is not allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scale_factors: Sequence[float] = SCALE_FACTORS,
        num_outs: int | None = None,
        norm_cfg: dict[str, Any] | None = LAYER_NORM_2D,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        _check(scale_factors, in_channels, out_channels)
        num_outs = len(scale_factors) if num_outs is None else num_outs
        if num_outs < len(scale_factors):
            raise ValueError(
                f'num_outs={num_outs} is less than the {len(scale_factors)} levels of '
                f'scale_factors={tuple(scale_factors)}; allowed: that number or more, or None'
            )
        self.in_channels = in_channels
        self.num_outs = num_outs
        self.levels = ModuleList(
            _level(in_channels, out_channels, factor, norm_cfg) for factor in scale_factors
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make ``num_outs`` maps (B, D, H', W'), largest first; H' is ``factor * H`` rounded up.

        Of the maps of a backbone the last one (B, C, H, W) is used; it may also come alone.

        Raises:
            TypeError: The last entry is no tensor, as with a class token beside each map.
            ValueError: There is no map, or it has another shape.
        """
        feature_map = self._last_map(inputs)
        outs = [level(feature_map) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)

    def _last_map(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        if not isinstance(inputs, Tensor) and len(inputs) == 0:
            raise ValueError('inputs holds no map; allowed: one tensor, or a sequence of them')
        last = inputs if isinstance(inputs, Tensor) else inputs[-1]
        if not isinstance(last, Tensor):
            raise TypeError(
                f'the last of inputs is a {type(last).__name__}; allowed: a tensor (B, '
                f'{self.in_channels}, H, W), so leave output_cls_token of the backbone False'
            )
        if last.ndim != 4 or last.shape[1] != self.in_channels:
            raise ValueError(
                f'the last of inputs has shape {tuple(last.shape)}; allowed: (B, '
                f'{self.in_channels}, H, W), as in_channels={self.in_channels} says'
            )
        return last


def _check(factors: Sequence[float], in_channels: int, out_channels: int) -> None:
    known = all(factor in SCALE_FACTORS for factor in factors)
    if not factors or not known or list(factors) != sorted(set(factors), reverse=True):
        raise ValueError(
            f'scale_factors={factors!r}; allowed: one or more of {SCALE_FACTORS}, decreasing'
        )
    step = max(1, int(factors[0]))  # each doubling of the size halves the channels
    if in_channels < 1 or in_channels % step:
        raise ValueError(
            f'in_channels={in_channels}; allowed: a multiple of {step}, because the largest of '
            f'scale_factors is {factors[0]:g}'
        )
    if out_channels < 1:
        raise ValueError(f'out_channels={out_channels}; allowed: 1 or more')


def _level(
    channels: int, out_channels: int, factor: float, norm_cfg: dict[str, Any] | None
) -> nn.Sequential:
    """Layers that change the size by ``factor``, then the two convolutions."""
    layers: list[nn.Module] = []
    if factor < 1:
        layers.append(nn.MaxPool2d(kernel_size=2, ceil_mode=True))
    while factor > 1:
        if layers:
            norm = [] if norm_cfg is None else [build_norm_layer(norm_cfg, channels)[1]]
            layers += [*norm, nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels, factor = channels // 2, factor / 2
    return nn.Sequential(
        *layers,
        ConvModule(channels, out_channels, 1, norm_cfg=norm_cfg, act_cfg=None),
        ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None),
    )
