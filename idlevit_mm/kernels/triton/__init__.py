"""The backend of GPUs: kernels in Triton on packed rows, static in shape, for inference."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...ops import Rows
from ..reference import Reference
from ..site import FORCED, Site, site_of

_HALF = torch.float16, torch.bfloat16
_LEAST_CAPABILITY = 8, 0


class Triton(Reference):
    """Window attention on packed rows; products with the norms and moves of rows around them.

    It covers the policy IdleViT with scores that need no weights, in Swin, PVT, PVTv2 and MiT;
    halves of other blocks, those of Swin V2 too, and of other plans go through their modules.
    """

    name = 'triton'

    def why_not(self, site: Site) -> str:
        if site.device != 'cuda':
            return _why_not_interpreted(site)
        if site.dtype not in _HALF:
            return f'tokens are {site.dtype}, and tensor cores are used in half precision'
        return _why_not_inference(site) or _why_not_device()

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        if rows.padded or not x.is_contiguous():
            return super().take(x, rows)
        from . import ops

        return ops.take_norm(x, rows.ids, None, None, None, 0.0)

    def choose(self, block: Any, *args: Any) -> Any | None:
        from . import halves

        return halves.choose(block, *args)

    def attention_half(self, block: Any, *args: Any) -> Any | None:
        from . import halves

        return halves.attention_half(block, *args)

    def mlp_half(self, block: Any, *args: Any) -> Any | None:
        from . import halves

        return halves.mlp_half(block, *args)


def _why_not_inference(site: Site) -> str:
    if site.grad:
        return 'gradients are wanted, and it is for inference'
    if site.traced:
        return 'a graph is recorded that others will read'
    return 'autocast is on' if site.autocast else ''


def _why_not_interpreted(site: Site) -> str:
    """On the CPU it is for tests, and slow: it must be asked for."""
    if site.device != 'cpu' or FORCED[-1:] != ['triton'] or not _INSTALLED:
        return f'the tokens lie on {site.device}'
    from . import ops

    if not ops.INTERPRETED:
        return 'the tokens lie on cpu, and TRITON_INTERPRET is not 1'
    known = site.dtype in (torch.float32, torch.float16)
    return _why_not_inference(site) if known else f'the interpreter has no {site.dtype}'


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
