"""Kernels of our own as operators of PyTorch: for compilers, and for whoever counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .site import site_of

# What operators move that touch a part of an input, for whoever counts it: qualified name to a
# function of the arguments that returns bytes read and bytes written.
TRAFFIC: dict[str, Callable[..., tuple[int, int]]] = {}


def operator(
    fake: Callable[..., Any],
    traffic: Callable[..., tuple[int, int]] | None = None,
    mutates: tuple[str, ...] = (),
    flops: Callable[..., int] | None = None,
    gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function, what it returns, moves, and computes (for counters).

    ``gradient`` is what keeps something for the backward pass, and the backward pass itself.
    """

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f'idlevit_mm::{function.__name__}'
        registered = custom_op(name, function, mutates_args=mutates)
        registered.register_fake(fake)
        if traffic is not None:
            TRAFFIC[name] = traffic
        if flops is not None:
            packet = getattr(torch.ops.idlevit_mm, function.__name__)
            register_flop_formula(packet, get_raw=True)(flops)
        if gradient is not None:
            registered.register_autograd(gradient[1], setup_context=gradient[0])

        def call(x: Tensor, *args: Any) -> Any:
            # Only who records or counts needs the dispatcher, which takes longer than a launch.
            site = site_of(x)
            direct = site.eager and not torch._C._len_torch_dispatch_stack()
            differentiable = gradient is not None and site.grad
            return function(x, *args) if direct and not differentiable else registered(x, *args)

        return call

    return made
