"""Window attention of Swin V2 on packed tokens (arXiv 2111.09883).

Shape letters: C channels, A heads, D channels of a head.
"""

import math

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..kernels import LINEAR, exact, is_plain
from .window_attention import ShiftWindowMSA, WindowMSA, relative_position_index

# Channels of the hidden layer that makes position biases, and the highest factor of the logits.
HIDDEN = 512
_MOST = 100.0
# Norm below which queries and keys are taken to be zero.
_EPS = 1e-12


class CosineWindowMSA(WindowMSA):
    """Attention by cosines, with position biases from a small network; mmpretrain's names.

    Queries and keys come out of the projection with their length divided out, and queries with the
    factor of their head: what follows is attention by products, of any backend.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        window_size: Side of a window in tokens.
        attn_drop_rate: Dropout of the attention weights.
        pretrained_window_size: Side of the window in which the biases were learned; 0 for this one.
        pad_small_map: Whether maps of one window or less are padded and shifted like others;
            without it one of one window is not shifted, and a smaller one is refused.
    """

    folds = False
    # In mmpretrain, timm and the release, whose highest logits are not hidden by it.
    apart = -100.0

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        attn_drop_rate: float = 0.0,
        pretrained_window_size: int = 0,
        pad_small_map: bool = True,
    ) -> None:
        self.pretrained_window_size = pretrained_window_size or window_size
        self.pad_small_map = pad_small_map
        super().__init__(embed_dims, num_heads, window_size, False, 1.0, attn_drop_rate)

    def _add_tables(self, head_dims: int) -> None:
        heads, embed_dims = self.num_heads, self.num_heads * head_dims
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.q_bias = nn.Parameter(torch.zeros(embed_dims))
        self.v_bias = nn.Parameter(torch.zeros(embed_dims))
        table = relative_coordinates(self.window_size, self.pretrained_window_size)
        self.register_buffer('relative_coords_table', table)
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, heads, bias=False)
        )
        self.register_buffer('relative_position_index', relative_position_index(self.window_size))

    def init_weights(self) -> None:
        """Leave all weights as the constructor draws them."""

    def shift_at(self, hw_shape: tuple[int, int]) -> int:
        if self.pad_small_map or min(hw_shape) > self.window_size:
            return self.shift_size
        if min(hw_shape) < self.window_size:
            raise SettingError(
                f'pad_small_map=False with a map of {hw_shape[0]}x{hw_shape[1]} tokens; allowed: '
                f'maps from window_size={self.window_size} on, or pad_small_map=True'
            )
        return 0

    def bias_table(self) -> Tensor:
        return 16 * self.cpb_mlp(self.relative_coords_table).flatten(0, 2).sigmoid()

    def weights(self) -> tuple[Tensor, Tensor] | None:
        return (self.qkv.weight, self._bias()) if is_plain(self.qkv, *LINEAR) else None

    def called(self, x: Tensor) -> Tensor:
        return self.qkv(x) + self._bias()

    def projected(self, x: Tensor) -> Tensor:
        return self.project(x, 0, 3)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        return self._on_sphere(super().project(x, first, last), first, last)

    def _bias(self) -> Tensor:
        """Of queries, keys and values: (3 * C,)."""
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def _on_sphere(self, parts: Tensor, first: int, last: int) -> Tensor:
        """Divide queries (0) and keys (1) by their lengths, of parts ``first`` up to ``last``."""
        if first == 2:
            return parts
        # (..., parts, A, D), and a factor of each head of each part: half precision cannot hold it.
        heads = exact(parts).unflatten(-1, (last - first, self.num_heads, -1))
        lengths = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
        factors = list(lengths.clamp(min=_EPS).reciprocal().unbind(-3))
        if first == 0:
            scale = exact(self.logit_scale).clamp(max=math.log(_MOST)).exp()
            factors[0] = factors[0] * scale.view(-1, 1)
        if last == 3:
            factors[-1] = torch.ones_like(factors[-1])
        return (heads * torch.stack(factors, dim=-3)).flatten(-3).to(parts.dtype)

    def _blank(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        return self._on_sphere(super()._blank(x, hw_shape), 0, 3)


class ShiftCosineMSA(ShiftWindowMSA):
    """Swin V2's attention in windows, shifted or not."""

    CORE = CosineWindowMSA


def relative_coordinates(window_size: int, learned: int) -> Tensor:
    """Steps from slot to slot on a scale of logarithms: (1, 2 * window - 1, 2 * window - 1, 2).

    ``learned`` is the side of the window in which the longest step is 1.
    """
    steps = torch.arange(1 - window_size, window_size, dtype=torch.float32)
    steps = steps / max(learned - 1, 1) * 8
    steps = steps.sign() * torch.log2(steps.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(steps, steps, indexing='ij'), dim=-1)[None]
