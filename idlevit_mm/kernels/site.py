"""Where code runs, and all that may decide how: the one place that asks."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_PLAIN = (Tensor, nn.Parameter)
# Names of the backends that are to be taken alone, the innermost last.
FORCED: list[str] = []


class Site(NamedTuple):
    """The circumstances of a computation; of a tensor only what is known without its values.

    Attributes:
        device: Kind of the device, such as ``cpu``.
        dtype: Precision of the tokens.
        eager: Whether operations run at once, so that shapes may follow from values.
        traced: Whether a graph is recorded that others will read: by torch.jit, torch.export
            or ONNX.
        grad: Whether gradients are wanted.
        autocast: Whether autocast is on.
    """

    device: str
    dtype: torch.dtype
    eager: bool
    traced: bool
    grad: bool
    autocast: bool

    @property
    def computing(self) -> torch.dtype:
        """Precision that layers compute in."""
        return torch.get_autocast_dtype(self.device) if self.autocast else self.dtype


def site_of(x: Tensor) -> Site:
    """The circumstances of operations on x."""
    device, grad = x.device.type, torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        exported = torch.compiler.is_exporting()
        return Site(device, x.dtype, False, exported, grad, autocasts(device))
    # Asked many times in a forward pass: who looks closer takes longer.
    traced = torch._C._is_tracing()
    plain = type(x) in _PLAIN and not torch._C._len_torch_dispatch_stack()
    recorded = not plain and (isinstance(x, FakeTensor) or get_proxy_mode() is not None)
    return Site(device, x.dtype, not (traced or recorded), traced, grad, autocasts(device))


def reads_values(x: Tensor) -> bool:
    """Whether Python may look at the values of x: they are there, and no graph is recorded."""
    if x.device.type == 'meta' or not site_of(x).eager:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device."""
    return device != 'meta' and torch.is_autocast_enabled(device)


def full_precision(x: Tensor) -> AbstractContextManager:
    """Switch autocast off where it is on for the device of x."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def exact(x: Tensor) -> Tensor:
    """At least float32: ranks, softmaxes and sums of squares of half precision are too coarse."""
    return x if x.dtype == torch.float64 else x.float()


def ranking_precision(x: Tensor, uses_weights: bool) -> Tensor:
    """X in the precision that tokens are ranked in.

    Half precision cannot tell close scores apart, and would rank differently under autocast; but
    for what computes with weights, a model that is in half precision as a whole has no other ones.
    """
    return x if uses_weights and not autocasts(x.device.type) else exact(x)
