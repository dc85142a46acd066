"""How the code is being run: by whom, where, and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device."""
    return device_type != 'meta' and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager:
    """Switch autocast off where it is on."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def eager_on_cpu(x: Tensor) -> bool:
    """Whether operations on x run on the CPU at once, so that shapes may follow from values."""
    return (
        x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
        and not isinstance(x, FakeTensor)
        and get_proxy_mode() is None
    )
