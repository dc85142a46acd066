"""Multiply-adds of a backbone or a whole model, counted operation by operation.

``torch.utils.flop_counter`` counts two operations per multiply-add and knows matrix products
and convolutions; gathers, scatters, sorting, norms and activations count 0, as in the papers.
Fused attention kernels on CPU are unknown to it and would count 0 as well, hence everything
here runs under the plain ("math") attention path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from idlevit_mm.analysis.models import blank_data_samples, checked_shape


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode and give each its own mode back afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def count_multiply_adds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of one call of ``function``, without gradients.

    Args:
        function: anything that can be called, a module included.
        *args: passed on to the function.
        **kwargs: passed on to the function.

    Returns:
        The number of multiply-adds of all matrix products and convolutions in the call.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*args, **kwargs)
    return counter.get_total_flops() // 2


def backbone_multiply_adds(backbone: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of a backbone for one input shape, in eval mode, on the device it lies on.

    A dense backbone may lie on the meta device, where nothing is computed.

    Args:
        backbone: a module that takes one image tensor.
        input_shape: (H, W), (C, H, W) or (B, C, H, W) in pixels; B is 1 and C is 3 if left out.

    Returns:
        Multiply-adds for the whole batch.

    Raises:
        ValueError: ``input_shape`` has not two to four positive sizes.
    """
    shape = checked_shape(input_shape)
    device = next(backbone.parameters()).device
    with _evaluating(backbone):
        return count_multiply_adds(backbone, torch.zeros(shape, device=device))


def model_multiply_adds(
    model: nn.Module, input_shape: Sequence[int], data_samples: Sequence[Any] | None = None
) -> dict[str, int]:
    """Multiply-adds of an mmdet or mmseg model, part by part, in its 'tensor' mode.

    That mode runs backbone, neck and heads without the losses and the post-processing. The
    heads of a two-stage detector see the proposals that its own region proposal network makes
    of a noise image (and the mask head at most 100 of them), as in mmdet's own tool.

    Args:
        model: a built detector or segmentor.
        input_shape: (H, W), (C, H, W) or (B, C, H, W) in pixels.
        data_samples: passed to the model; made here for a model that needs them when None.

    Returns:
        ``{part: multiply-adds}`` for every direct submodule that does any, then 'other' (what
        the model does outside its parts) if that is not 0, then 'total'.

    Raises:
        ValueError: ``input_shape`` has not two to four positive sizes.
    """
    shape = checked_shape(input_shape)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(shape, generator=generator).to(device)
    if data_samples is None:
        data_samples = blank_data_samples(model, shape)
    counter = FlopCounterMode(display=False)
    with (
        _evaluating(model),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        model(image, data_samples, mode='tensor')
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def count_of(module: nn.Module, name: str) -> int:
        # A head's `forward` is often called directly: then only its children were seen.
        if name in counts:
            return counts[name]
        return sum(count_of(child, f'{name}.{part}') for part, child in module.named_children())

    root = type(model).__name__
    parts = {part: count_of(child, f'{root}.{part}') // 2 for part, child in model.named_children()}
    parts = {part: count for part, count in parts.items() if count}
    total = counter.get_total_flops() // 2
    other = total - sum(parts.values())
    return {**parts, **({'other': other} if other else {}), 'total': total}


def pretty(count: int | float) -> str:
    """A count with three significant digits and its unit: ``'96.1 G'``, ``'512 M'``."""
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if count >= size:
            return (
                f'{count / size:.3g} {unit}'
                if count < 1000 * size
                else f'{count / size:.0f} {unit}'
            )
    return f'{count:.0f}'
