"""Multiply-adds of a backbone or a whole model, counted operation by operation as they run.

``torch.utils.flop_counter`` counts two operations per multiply-add and knows matrix products
and convolutions; gathers, scatters, sorting, norms and activations count 0, as in the papers.
What it does not know or counts otherwise is in ``FORMULAS``:

- fused attention of the CPU, which it does not know, and so would count as 0;
- the backward pass of any fused attention, where it counts the logits that the kernel computes a
  second time: here the count is that of the plain ("math") path, whichever kernel runs;
- the backward pass of grouped convolutions, whose weight gradient it counts as if there were
  one group (for a depth-wise convolution of C channels C times too many);
- products with vectors.

Compiled extensions outside PyTorch's dispatcher (mmcv's deformable convolution, for one) are not
seen and count 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ..engine.assembly import evaluating
from .models import blank_data_samples, noise_image

Shape = Sequence[int]

OTHER, TOTAL = 'other', 'total'
# By which a detector or segmentor calls its parts.
_ENTRANCES = ('forward', 'predict', 'loss')


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Operations of (..., T, D) queries, (..., K, D) keys and (..., K, E) values."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(_: Shape, *inputs: Any, **__: Any) -> int:
    return 2 * _attention(*inputs[:3])


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Each of the gradients of input and weight costs what the forward pass costs."""
    transposed, output_mask = rest[4], rest[7]
    forward = conv_flop_count(list(x), list(weight), list(grad), transposed=transposed)
    return forward * sum(bool(asked) for asked in output_mask[:2])


# Formulas of operations per name in torch.ops.aten; a version of PyTorch need not have them all.
FORMULAS: dict[str, Callable[..., int]] = {
    'convolution_backward': _convolution_backward,
    '_addmm_activation': lambda _, a, b, **__: 2 * prod(a) * b[-1],
    'addbmm': lambda _, a, b, **__: 2 * prod(a) * b[-1],
    'mv': lambda matrix, _, **__: 2 * prod(matrix),
    'addmv': lambda _, matrix, __, **___: 2 * prod(matrix),
    'dot': lambda a, _, **__: 2 * prod(a),
}
for _kernel in (
    *('flash_attention', 'efficient_attention', 'cudnn_attention', 'flash_attention_for_cpu'),
    'fused_attention_overrideable',
):
    FORMULAS[f'_scaled_dot_product_{_kernel}'] = _attention
    FORMULAS[f'_scaled_dot_product_{_kernel}_backward'] = _attention_backward


class MultiplyAddCounter(FlopCounterMode):
    """Counts the multiply-adds of what runs inside its ``with`` block, gradients included.

    What runs twice, such as a block that is recomputed in the backward pass, counts twice.
    """

    def __init__(self) -> None:
        aten = torch.ops.aten
        known = {getattr(aten, name): fn for name, fn in FORMULAS.items() if hasattr(aten, name)}
        super().__init__(display=False, custom_mapping=known)

    def __enter__(self) -> Any:
        # In eval mode PyTorch runs attention modules as one operation; its parts are known.
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        return super().__exit__(*args)

    @property
    def multiply_adds(self) -> int:
        """The count so far."""
        return self.get_total_flops() // 2


def count_multiply_adds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of one call of a function or module, without gradients."""
    with torch.no_grad(), MultiplyAddCounter() as counter:
        function(*args, **kwargs)
    return counter.multiply_adds


def part_multiply_adds(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Multiply-adds of one call of a model, without gradients, by its parts.

    The names of ``FlopCounterMode.get_flop_counts`` are not enough: they miss methods of heads that
    are called directly, and what a decoder does with branches of a head they count twice.

    Returns:
        ``{part: multiply-adds}`` for every direct submodule that does any, then 'other' (what
        the call does outside them) if that is not 0, then 'total'.
    """
    children = dict(model.named_children())
    # A module that two parts share belongs to the first.
    owners = {module: name for name in reversed(children) for module in children[name].modules()}
    counts = dict.fromkeys([*children, OTHER], 0)
    running = [OTHER]

    def charge() -> None:
        counts[running[-1]] += counter.multiply_adds - sum(counts.values())

    def enter(module: nn.Module, *_: Any) -> None:
        charge()
        running.append(owners.get(module, running[-1]))

    def leave(*_: Any) -> None:
        charge()
        running.pop()

    def direct(part: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        enter(part)
        result = method(*args, **kwargs)
        leave()
        return result

    with ExitStack() as stack, torch.no_grad(), MultiplyAddCounter() as counter:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        for child in children.values():
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                for name in _ENTRANCES:
                    if inspect.ismethod(method := getattr(part, name, None)):
                        patched = partial(direct, part, method)
                        stack.enter_context(mock.patch.object(part, name, patched))
        model(*args, **kwargs)
        charge()
    found = {name: count for name, count in counts.items() if count}
    return {**found, TOTAL: sum(counts.values())}


def backbone_multiply_adds(backbone: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of a backbone for (H, W), (C, H, W) or (B, C, H, W) pixels, in eval mode.

    A dense backbone may lie on the meta device, where nothing is computed. The image is noise: how
    active tokens share out among windows depends on it, and on the CPU so does the count.
    """
    with evaluating(backbone):
        images = noise_image(input_shape, next(backbone.parameters()).device, backbone)
        return count_multiply_adds(backbone, images)


def model_multiply_adds(
    model: nn.Module, input_shape: Sequence[int], backbone_only: bool = False
) -> dict[str, int]:
    """Multiply-adds of an mmdet or mmseg model, part by part, in its 'tensor' mode.

    That mode runs backbone, neck and heads on the whole image without the losses and the
    post-processing. The heads of a two-stage detector see the proposals that its own region
    proposal network makes of a noise image (and the mask head at most 100 of them), as in mmdet's
    own tool. Of a bare backbone, and with ``backbone_only``, there is one part and no total.
    """
    if backbone_only or not hasattr(model, 'backbone'):
        backbone = getattr(model, 'backbone', model)
        return {'backbone': backbone_multiply_adds(backbone, input_shape)}
    with evaluating(model):
        images = noise_image(input_shape, next(model.parameters()).device, model)
        samples = blank_data_samples(model, images.shape)
        return part_multiply_adds(model, images, samples, mode='tensor')


def pretty(count: float) -> str:
    """A count with three significant digits and its unit: ``'96.1 G'``, ``'512 M'``."""
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if count >= size:
            return f'{float(f"{count / size:.3g}"):g} {unit}'
    return f'{count:.0f}'
