"""The backend of GPUs: kernels in Triton on packed rows, static in shape, in half precision."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...ops import Rows
from ..reference import Reference
from ..site import FORCED, Site, site_of
from ..slots import WindowCore

_HALF = torch.float16, torch.bfloat16
_LEAST_CAPABILITY = 8, 0


class Triton(Reference):
    """Window attention on packed rows; products with the norms and moves of rows around them.

    In training and under autocast layers are called one by one, and attention and moves have
    gradients of their own. It covers the policy IdleViT with scores that need no weights, in Swin,
    PVT, PVTv2 and MiT; halves of other blocks, those of Swin V2 too, and of other plans go through
    their modules.
    """

    name = 'triton'

    def why_not(self, site: Site) -> str:
        if site.device != 'cuda':
            return _why_not_interpreted(site)
        if site.computing not in _HALF:
            return f'layers compute in {site.computing}, and tensor cores are for half precision'
        return _why_not_traced(site) or _why_not_device()

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        known = rows.places is not None or not site_of(x).grad
        if rows.padded or not known or not x.is_contiguous():
            return super().take(x, rows)
        from . import training

        return training.gather_rows(x, rows.ids, rows.places)

    def put(self, x: Tensor, rows: Rows, values: Tensor) -> Tensor:
        if rows.places is None or not x.is_contiguous():
            return super().put(x, rows, values)
        from . import training

        return training.join_rows(rows.places, rows.ids, x, values.to(x.dtype).contiguous())

    def attend_windows(
        self,
        qkv: Tensor,
        core: WindowCore,
        hw_shape: tuple[int, int],
        shift_size: int,
        rows: Rows | None,
    ) -> Tensor:
        from . import training

        if not training.attends(qkv, core, rows):
            return super().attend_windows(qkv, core, hw_shape, shift_size, rows)
        return training.attend_windows(qkv, core, hw_shape, shift_size, rows)

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        from . import fusions, ops

        # PyTorch's takes five times as long where channels are few.
        in_order = x.is_contiguous() or (x.ndim == 3 and x.mT.is_contiguous())
        if weight is None or bias is None or not (in_order and fusions.infers(x)):
            return super().layer_norm(x, weight, bias, eps)
        return ops.take_norm(x, None, None, weight, bias, eps)

    def choose(self, block: Any, *args: Any) -> Any | None:
        from . import halves

        return halves.choose(block, *args)

    def attention_half(self, block: Any, *args: Any) -> Any | None:
        from . import halves

        return halves.attention_half(block, *args)

    def mlp_half(self, block: Any, *args: Any) -> Any | None:
        from . import halves

        return halves.mlp_half(block, *args)


def _why_not_traced(site: Site) -> str:
    return 'a graph is recorded that others will read' if site.traced else ''


def _why_not_interpreted(site: Site) -> str:
    """On the CPU it is for tests, and slow: it must be asked for."""
    if site.device != 'cpu' or FORCED[-1:] != ['triton'] or not _INSTALLED:
        return f'the tokens lie on {site.device}'
    from . import ops

    if not ops.INTERPRETED:
        return 'the tokens lie on cpu, and TRITON_INTERPRET is not 1'
    known = site.computing in (torch.float32, torch.float16)
    return _why_not_traced(site) if known else f'the interpreter has no {site.computing}'


@torch.compiler.assume_constant_result
@cache
def _why_not_device() -> str:
    if not _INSTALLED:
        return 'triton is not installed'
    if torch.version.hip:
        return 'it was never tried on ROCm'
    # Of fake tensors that lie on a device which is not there nothing is known.
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return 'the device has no tensor cores that Triton uses'
    return ''


_INSTALLED = find_spec('triton') is not None
