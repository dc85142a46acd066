"""Count what backbones move, with the kernels of GPUs and without: nothing is run.

    TRITON_INTERPRET=1 python tools/analysis_tools/count_traffic.py swin-t --mode training

Tensors are fake. In inference all is float16; in a step of training weights are float32 and layers
under float16 autocast. Attention of PyTorch counts as its memory-efficient one, less the copy that
aligns a mask. Kept is what the backward pass reads, less the weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from presets import PRESETS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from traffic import Traffic

from idlevit_mm.analysis import models
from idlevit_mm.analysis.results import exit_code
from idlevit_mm.errors import UsageError
from idlevit_mm.kernels import backend_at, use_backend

_HALF = torch.float16


class _OneAttention(TorchFunctionMode):
    """Attention is one operation, as on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (part.to(_HALF) for part in args)
        mask, scale = kwargs.get('attn_mask'), kwargs.get('scale')
        if mask is not None:
            mask = mask.to(_HALF).expand(*query.shape[:3], key.shape[2])
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, mask, True, scale=scale)[0]


def count(
    name: str, keep_ratio: float, shape: Sequence[int], backend: str, training: bool
) -> tuple[Traffic, int]:
    """What a preset moves on images (B, 3, H, W) by a backend, and bytes it keeps."""
    model = models.load_model(Config(dict(model=PRESETS[name]))).train(training)
    if not training:
        model.to(_HALF)
    model.set_keep_ratios(keep_ratio)
    counted, kept = Traffic(), {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    module._parameters[key] = torch.nn.Parameter(fake)
        weights = {x.untyped_storage()._cdata for x in model.parameters()}
        x = torch.empty(*shape, dtype=torch.float32 if training else _HALF)
        autocast = torch.autocast('cpu', _HALF, enabled=training)
        with autocast, torch.set_grad_enabled(training), use_backend(backend):
            if backend_at(x).name != backend:
                raise UsageError(f'TRITON_INTERPRET must be 1, for {backend} is not taken without')
            # Tables are made in the first pass.
            model(x)
            with _OneAttention(), counted:
                with saved_tensors_hooks(keep, lambda x: x):
                    outs = model(x)
                if training:
                    sum(out.sum() for out in outs).backward()
    sizes = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights]
    return counted, sum(sizes)


@exit_code
def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each model, keep ratio and backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('models', nargs='+', choices=PRESETS)
    parser.add_argument('--keep-ratios', nargs='+', type=float, default=[1.0, 0.5])
    parser.add_argument('--mode', choices=('inference', 'training'), default='inference')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--shape', default='800x1344', metavar='HxW')
    args = parser.parse_args(argv)
    ((height, width),) = models.parse_shapes([args.shape])
    print('| model | keep | by | GB moved | GB kept | operations |\n|---|---|---|---|---|---|')
    shape, training = (args.batch, 3, height, width), args.mode == 'training'
    ways = product(args.models, args.keep_ratios, ('reference', 'triton'))
    for name, ratio, backend in ways:
        found, kept = count(name, ratio, shape, backend, training)
        sizes = f'{found.bytes.total() / 1e9:.2f} | {kept / 1e9:.2f}'
        print(f'| {name} | {ratio:g} | {backend} | {sizes} | {found.operations.total()} |')


if __name__ == '__main__':
    sys.exit(main())
