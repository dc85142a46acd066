"""The kernels of ``native.c``: compiled once for a processor, called without PyTorch's dispatcher.

Packed rows are read where they lie: attention in windows copies nothing to slots, and PVTv2's
convolution computes active rows alone. All are for inference, attention for training as well. Where
there is no compiler, PyTorch computes the same.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels, A heads, L slots of a window.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops import Rows, window_numbers
from ..operators import operator
from ..site import site_of
from ..slots import WindowCore

_SOURCE = Path(__file__).with_suffix('.c')
_FLAGS = ('-O3', '-march=native', '-fopenmp', '-fPIC', '-std=gnu11')
# Set to 0, it switches the kernels off.
_SWITCH = 'IDLEVIT_MM_NATIVE'
_LANES = 16
# What hides a key there.
_HIDDEN = -1e30
# Halves are computed as float32.
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def usable(x: Tensor, grad: bool = False) -> bool:
    """Whether the kernels may compute with x: in inference, or those with a gradient (``grad``)."""
    site = site_of(x)
    without = site.grad and not grad
    return site.dtype in _DTYPES and site.eager and not (without or why_not())


def attends(qkv: Tensor, core: WindowCore) -> bool:
    """Whether the kernel of attention in windows may compute with (B, T, 3 * C)."""
    depth = qkv.shape[2] // 3 // core.num_heads
    plain = not core.dropout and core.drop is None and core.pairs is None
    return plain and depth % _LANES == 0 and usable(qkv, grad=True)


def attend_windows(
    qkv: Tensor, core: WindowCore, hw_shape: tuple[int, int], shift_size: int, rows: Rows | None
) -> Tensor:
    """``Reference.attend_windows`` of tokens and summaries, without dropout; with gradients."""
    # Summaries have no bias.
    tensors = qkv, core.blank, F.pad(core.bias[0], (0, 1, 0, 1))
    ids = None if rows is None else rows.ids.expand(len(qkv), -1).contiguous()
    sizes = [*hw_shape, core.window_size, shift_size, core.num_heads, int(core.hides_padding)]
    factors = [core.scale, _HIDDEN if core.apart is None else core.apart]
    out = _Attend.apply(*(part.float() for part in tensors), ids, sizes, factors)
    return out.to(qkv.dtype)


def convolve(
    x: Tensor,
    blank: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    hw_shape: tuple[int, int],
    rows: Rows,
    cells: Tensor | None,
) -> Tensor:
    """``Reference.convolve`` of some rows."""
    tensors = x, blank, weight.flatten(1).t(), bias, rows.ids.expand(len(x), -1), cells
    return convolve_rows(*map(_single, tensors), [*hw_shape, weight.shape[-1]]).to(x.dtype)


class _Attend(torch.autograd.Function):
    """Attention that keeps queries, keys and values and computes the weights anew."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return attend_packed(*map(_single, inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ids, ctx.sizes, ctx.factors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = map(_single, (*ctx.saved_tensors, grad))
        grads = attend_packed_backward(*tensors, ctx.ids, ctx.sizes, ctx.factors)
        return (*grads, None, None, None)


def _pairs(qkv: Tensor, ids: Tensor | None, sizes: list[int]) -> int:
    """Pairs of a query and a key, of all windows of a batch."""
    layout = window_numbers(*sizes[:4])
    (windows, slots), batch = layout.token_ids.shape, len(qkv)
    padding = (layout.token_ids < 0).sum(1)
    active = np.broadcast_to(slots - padding, (batch, windows))
    if ids is not None:
        places = np.append(layout.window_ids, windows)[ids.numpy()]
        active = np.stack([np.bincount(image, minlength=windows + 1)[:-1] for image in places])
    summaries = np.zeros_like(active)
    if ids is not None and qkv.shape[1] > ids.shape[1]:
        summaries = (active + padding < slots).astype(int)
    queries = active + summaries
    return int((queries * (queries + (not sizes[5]) * padding)).sum())


def _attention_flops(
    qkv: Tensor, blank: Tensor, bias: Tensor, ids: Any, sizes: Any, *_: Any, **__: Any
) -> int:
    return 4 * _pairs(qkv, ids, sizes) * (qkv.shape[2] // 3)


def _attention_backward_flops(
    qkv: Tensor, blank: Tensor, bias: Tensor, grad: Tensor, *rest: Any, **__: Any
) -> int:
    return 2 * _attention_flops(qkv, blank, bias, *rest)


def _attend(
    qkv: Tensor,
    blank: Tensor,
    bias: Tensor,
    out: Tensor,
    grads: Sequence[Tensor | None],
    ids: Tensor | None,
    sizes: list[int],
    factors: list[float],
) -> None:
    batch, total, width = qkv.shape
    count = total if ids is None else ids.shape[1]
    numbers = batch, count, total, *sizes, width // 3, *factors
    _call('attend', qkv, blank, bias, out, *grads, ids, *numbers)


@operator(lambda qkv, *_: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3), flops=_attention_flops)
def attend_packed(
    qkv: Tensor,
    blank: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    sizes: list[int],
    factors: list[float],
) -> Tensor:
    """Attention in windows of packed rows (B, T + R, 3 * C), of all without ids: (B, T + R, C).

    Blank (3 * C,) is padding, bias (A, L + 1, L + 1) that of slots and of summaries; sizes are
    height and width of the map, side and shift of windows, the number of heads, and 1 where padding
    is hidden; factors are that of the logits and what is added to those of pairs in two regions.
    """
    out = qkv.new_zeros(*qkv.shape[:2], qkv.shape[2] // 3)
    _attend(qkv, blank, bias, out, (None, None, None), ids, sizes, factors)
    return out


@operator(
    lambda qkv, blank, bias, *_: [torch.empty_like(part) for part in (qkv, blank, bias)],
    flops=_attention_backward_flops,
)
def attend_packed_backward(
    qkv: Tensor,
    blank: Tensor,
    bias: Tensor,
    grad: Tensor,
    ids: Tensor | None,
    sizes: list[int],
    factors: list[float],
) -> list[Tensor]:
    """Gradients of the first three arguments of ``attend_packed``."""
    grads = [torch.zeros_like(part) for part in (qkv, blank, bias)]
    _attend(qkv, blank, bias, grad, grads, ids, sizes, factors)
    return grads


@operator(
    lambda x, *_: torch.empty_like(x),
    flops=lambda x, blank, taps, *_, **__: 2 * x.numel() * len(taps),
)
def convolve_rows(
    x: Tensor,
    blank: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    cells: Tensor | None,
    sizes: list[int],
) -> Tensor:
    """Depth-wise convolution of rows (B, T, C) by taps (side ** 2, C): (B, T, C)."""
    out = torch.empty_like(x)
    shapes = *x.shape[:2], *sizes, x.shape[2], 0 if blank is None else blank.shape[1]
    _call('convolve', x, blank, taps, bias, out, ids, cells, *shapes)
    return out


def distance(x: Tensor, other: Tensor) -> Tensor:
    """``Reference.distance``."""
    out = torch.empty(x.shape[:2])
    _call('distance', _single(x), _single(other), out, *x.shape)
    return out


def best(scores: Tensor, count: int) -> Tensor:
    """``Reference.best`` of one group: scores (B, 1, U) to (B, K)."""
    batch, _, units = scores.shape
    out = torch.empty(batch, count, dtype=torch.int64)
    _call('best', _single(scores), out, batch, units, count)
    return out


def put(x: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """Put rows back into x itself, which is float32 and contiguous."""
    ids = rows.ids.expand(len(x), -1).contiguous()
    _call('put', x, ids, _single(values), len(x), ids.shape[1], *x.shape[1:])
    return x


def why_not() -> str:
    """In words why there are no kernels; '' if there are."""
    if os.environ.get(_SWITCH) == '0':
        return f'{_SWITCH}=0'
    found = _library()
    return found if isinstance(found, str) else ''


def _single(x: Any) -> Any:
    """Tensors of numbers as the kernels read them; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    return (x.float() if x.is_floating_point() else x).contiguous()


def _call(name: str, *args: Tensor | float | None) -> None:
    given = [
        ctypes.c_void_p(arg.data_ptr())
        if isinstance(arg, Tensor)
        else ctypes.c_float(arg)
        if isinstance(arg, float)
        else arg
        for arg in args
    ]
    with torch.autograd.profiler.record_function(f'idlevit_mm::{name}'):
        if getattr(_library(), name)(*given):
            raise MemoryError(f'{name} of {_SOURCE.name} got no memory')


@cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or in words why there are none."""
    compiler = shutil.which(os.environ.get('CC') or 'gcc')
    runtime = _openmp()
    if compiler is None or runtime is None:
        return 'there is no C compiler' if compiler is None else 'PyTorch has no OpenMP of its own'
    try:
        version = subprocess.run([compiler, '--version'], capture_output=True, check=True).stdout
        parts = (_SOURCE.read_bytes(), version, repr(_FLAGS).encode(), _processor())
        key = hashlib.sha256(b'\0'.join(parts)).hexdigest()[:16]
        file = _folder() / f'{key}.so'
        if not file.is_file():
            _compile(compiler, file)
        # Its threads are those of PyTorch: a second pool of them would wait for the first.
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        return f'{compiler} failed: {error.stderr.decode(errors="replace").strip()[-200:]}'
    except OSError as error:
        return f'they cannot be compiled: {error}'


def _compile(compiler: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        parts = Path(folder, 'native.o'), Path(folder, 'native.so')
        for command in (
            [compiler, *_FLAGS, '-c', str(_SOURCE), '-o', str(parts[0])],
            # Without OpenMP's library: its symbols are those that are loaded.
            [compiler, '-shared', str(parts[0]), '-o', str(parts[1])],
        ):
            subprocess.run(command, capture_output=True, check=True)
        os.replace(parts[1], file)


def _folder() -> Path:
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(os.environ.get('IDLEVIT_MM_CACHE') or Path(cache, 'idlevit_mm'), 'native')


def _openmp() -> str | None:
    """The OpenMP that PyTorch has loaded."""
    try:
        lines = Path('/proc/self/maps').read_text().splitlines()
    except OSError:
        return None
    files = {line.split()[-1] for line in lines if line.endswith(('.so', '.so.1', '.so.5'))}
    names = [file for file in files if Path(file).name.startswith(('libgomp', 'libiomp5'))]
    return min(names, key=lambda file: 'torch' not in file, default=None)


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return '\n'.join(
        sorted({line for line in lines if line.startswith(('flags', 'Features'))})
    ).encode()
