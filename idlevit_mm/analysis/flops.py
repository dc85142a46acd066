"""Multiply-adds of a backbone or a whole model, counted operation by operation as they run.

``torch.utils.flop_counter`` counts two operations per multiply-add and knows matrix products
and convolutions; gathers, scatters, sorting, norms and activations count 0, as in the papers.
What it does not know or counts otherwise is in ``FORMULAS``:

- fused attention of the CPU, which it does not know, and so would count as 0;
- the backward pass of any fused attention, where it counts the logits that the kernel computes a
  second time: here the count is that of the plain ("math") path, whichever kernel runs;
- the backward pass of grouped convolutions, whose weight gradient it counts as if there were
  one group (for a depth-wise convolution of C channels C times too many);
- whole attention modules that PyTorch runs as one operation in eval mode, and products with
  vectors.

Hence nothing has to run otherwise for the sake of counting. Compiled extensions outside PyTorch's
dispatcher (mmcv's deformable convolution, for one) are not seen and count 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from idlevit_mm.analysis.meter import OTHER, Call, metered, module_calls
from idlevit_mm.analysis.models import blank_data_samples, checked_shape, noise_image, share_kept

Shape = Sequence[int]

TOTAL = 'total'
# By which a detector or segmentor calls its parts.
_ENTRANCES = ('forward', 'predict', 'loss')


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Operations of (..., T, D) queries, (..., K, D) keys and (..., K, E) values."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    _grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return 2 * _attention(query, key, value)


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Each of the gradients of input and weight costs what the forward pass costs."""
    transposed, output_mask = rest[4], rest[7]
    forward = conv_flop_count(list(x), list(weight), list(grad), transposed=transposed)
    return forward * sum(bool(asked) for asked in output_mask[:2])


def _whole_attention(
    query: Shape,
    key: Shape,
    _value: Shape,
    channels: int,
    _heads: int,
    qkv: Shape,
    _qkv_bias: Shape,
    projection: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """``nn.MultiheadAttention`` in one operation, of which all inputs are the same tokens."""
    projections = 2 * prod(query[:-1]) * (prod(qkv) + prod(projection))
    return projections + 2 * prod(query[:-1]) * key[-2] * 2 * channels


def _whole_layer(
    tokens: Shape,
    channels: int,
    heads: int,
    qkv: Shape,
    bias: Shape,
    out: Shape,
    *rest: Any,
    **_: Any,
) -> int:
    """``nn.TransformerEncoderLayer`` in one operation."""
    hidden = 2 * prod(tokens[:-1]) * (prod(rest[8]) + prod(rest[10]))
    return hidden + _whole_attention(tokens, tokens, tokens, channels, heads, qkv, bias, out)


# Formulas of operations per name in torch.ops.aten; a version of PyTorch need not have them all.
FORMULAS: dict[str, Callable[..., int]] = {
    '_scaled_dot_product_flash_attention_for_cpu': _attention,
    '_scaled_dot_product_flash_attention': _attention,
    '_scaled_dot_product_efficient_attention': _attention,
    '_scaled_dot_product_cudnn_attention': _attention,
    '_scaled_dot_product_fused_attention_overrideable': _attention,
    '_scaled_dot_product_flash_attention_for_cpu_backward': _attention_backward,
    '_scaled_dot_product_flash_attention_backward': _attention_backward,
    '_scaled_dot_product_efficient_attention_backward': _attention_backward,
    '_scaled_dot_product_cudnn_attention_backward': _attention_backward,
    '_scaled_dot_product_fused_attention_overrideable_backward': _attention_backward,
    'convolution_backward': _convolution_backward,
    '_native_multi_head_attention': _whole_attention,
    '_transformer_encoder_layer_fwd': _whole_layer,
    '_addmm_activation': lambda _, a, b, **__: 2 * prod(a) * b[-1],
    'addbmm': lambda _, a, b, **__: 2 * prod(a) * b[-1],
    'mv': lambda matrix, _, **__: 2 * prod(matrix),
    'addmv': lambda _, matrix, __, **___: 2 * prod(matrix),
    'dot': lambda a, _, **__: 2 * prod(a),
}


class MultiplyAddCounter(FlopCounterMode):
    """Counts the multiply-adds of what runs inside its ``with`` block, gradients included.

    What runs twice, such as a block that is recomputed in the backward pass, counts twice.

    Example::

        with MultiplyAddCounter() as counter:
            model(image).sum().backward()
        print(counter.multiply_adds)
    """

    def __init__(self) -> None:
        aten = torch.ops.aten
        known = {getattr(aten, name): fn for name, fn in FORMULAS.items() if hasattr(aten, name)}
        super().__init__(display=False, custom_mapping=known)

    @property
    def multiply_adds(self) -> int:
        """The count so far."""
        return self.get_total_flops() // 2


@dataclass(frozen=True)
class DataCount:
    """Multiply-adds per image over some images of a data set.

    Attributes:
        images: how many.
        parts: ``{part: mean}``, with the mean of 'total' at the end.
        low: the smallest total of an image (of a batch, divided by its images).
        high: the largest.
        share_active: mean share of active tokens, all blocks counted alike; None for a backbone
            without idle tokens.
    """

    images: int
    parts: dict[str, float]
    low: float
    high: float
    share_active: float | None


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
    with torch.no_grad(), MultiplyAddCounter() as counter:
        function(*args, **kwargs)
    return counter.multiply_adds


def part_multiply_adds(
    model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[str, int]:
    """Multiply-adds of one call of ``function``, without gradients, by the parts of a model.

    Args:
        model: what the function calls, part by part.
        function: the model itself, or anything that calls its parts.
        *args: passed on to the function.
        **kwargs: passed on to the function.

    Returns:
        ``{part: multiply-adds}`` for every direct submodule that does any, then 'other' (what
        the call does outside them) if that is not 0, then 'total'.
    """
    calls: list[Call] = []
    for name, part in model.named_children():
        # A head's `forward` is often called directly, and sometimes only what is in it.
        calls += module_calls(name, part, _ENTRANCES)
    with torch.no_grad(), MultiplyAddCounter() as counter:
        with metered(calls, lambda: counter.multiply_adds) as meter:
            function(*args, **kwargs)
            meter.charge()
        counts = {name: int(count) for name, count in meter.totals.items() if count}
    other = counts.pop(OTHER, 0)
    order = [name for name, _ in model.named_children() if name in counts]
    parts = {name: counts[name] for name in order}
    total = counter.multiply_adds
    return {**parts, **({OTHER: other} if other else {}), TOTAL: total}


def backbone_multiply_adds(backbone: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of a backbone for one input shape, in eval mode, on the device it lies on.

    A dense backbone may lie on the meta device, where nothing is computed. The image is noise: how
    active tokens share out among windows depends on it, and on the CPU so does the count.

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
        return count_multiply_adds(backbone, noise_image(shape, device))


def model_multiply_adds(
    model: nn.Module, input_shape: Sequence[int], data_samples: Sequence[Any] | None = None
) -> dict[str, int]:
    """Multiply-adds of an mmdet or mmseg model, part by part, in its 'tensor' mode.

    That mode runs backbone, neck and heads on the whole image without the losses and the
    post-processing. The heads of a two-stage detector see the proposals that its own region
    proposal network makes of a noise image (and the mask head at most 100 of them), as in mmdet's
    own tool.

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
    if data_samples is None:
        data_samples = blank_data_samples(model, shape)
    with _evaluating(model):
        return part_multiply_adds(
            model, model, noise_image(shape, device), data_samples, mode='tensor'
        )


def data_multiply_adds(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    training: bool = False,
    backbone_only: bool = False,
) -> DataCount:
    """Multiply-adds per image of a model on real data, in eval mode, without post-processing.

    Args:
        model: a built detector or segmentor with its ``data_preprocessor``.
        batches: what its data loader yields.
        training: whether the batches are preprocessed as for training.
        backbone_only: whether to run the backbone alone.

    Returns:
        Means and extremes.

    Raises:
        ValueError: there is no batch.
    """
    per_image: list[dict[str, float]] = []
    images: list[int] = []
    shares: list[float] = []
    backbone = getattr(model, 'backbone', model)
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            data = model.data_preprocessor(batch, training)
            inputs = data['inputs']
            if backbone_only:
                counts = {'backbone': count_multiply_adds(backbone, inputs)}
                counts[TOTAL] = counts['backbone']
            else:
                samples = data.get('data_samples')
                counts = part_multiply_adds(model, model, inputs, samples, mode='tensor')
            images.append(len(inputs))
            per_image.append({part: count / len(inputs) for part, count in counts.items()})
            if hasattr(backbone, 'set_keep_ratios'):
                shares.append(share_kept(backbone))
    if not images:
        raise ValueError('batches hold no image to count')
    totals = [counts[TOTAL] for counts in per_image]

    def mean(values: Iterable[float]) -> float:
        return sum(n * value for n, value in zip(images, values, strict=True)) / sum(images)

    names = dict.fromkeys(name for counts in per_image for name in counts if name != TOTAL)
    parts = {
        name: mean([counts.get(name, 0.0) for counts in per_image]) for name in (*names, TOTAL)
    }
    share = mean(shares) if shares else None
    return DataCount(sum(images), parts, min(totals), max(totals), share)


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
