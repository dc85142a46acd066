"""The kernels of ``native.c``: compiled once for a processor, called without PyTorch's dispatcher.

Packed rows are read where they lie: attention in windows copies nothing to slots, and PVTv2's
convolution computes active rows alone. Where there is no compiler, PyTorch computes the same.

Shape letters: B images, N tokens of the map (H * W), T active tokens, R summaries of idle tokens,
C channels, A heads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import Rows
from ..site import site_of
from ..slots import WindowCore

_SOURCE = Path(__file__).with_suffix('.c')
_FLAGS = ('-O3', '-march=native', '-fopenmp', '-fPIC', '-std=gnu11')
# Set to 0, it switches the kernels off.
_SWITCH = 'IDLEVIT_MM_NATIVE'
_LANES = 16
# Halves are computed as float32.
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def usable(x: Tensor) -> bool:
    """Whether the kernels may compute with x: on the CPU, in inference, while nobody counts."""
    site = site_of(x)
    counted = torch._C._len_torch_dispatch_stack()
    return site.dtype in _DTYPES and site.eager and not (site.grad or counted or why_not())


def attend_windows(
    qkv: Tensor, core: WindowCore, hw_shape: tuple[int, int], shift_size: int, rows: Rows | None
) -> Tensor | None:
    """``Reference.attend_windows`` of tokens and summaries; None for what is not covered."""
    batch, total, width = qkv.shape
    channels = width // 3
    if channels // core.num_heads % _LANES or (rows is not None and rows.windows is not None):
        return None
    tensors = qkv, core.blank, F.pad(core.bias[0], (0, 1, 0, 1))
    ids = None if rows is None else rows.ids.expand(batch, -1).contiguous()
    count = total if ids is None else ids.shape[1]
    # Summaries of nothing have no place.
    out = (torch.empty if count == total else torch.zeros)(batch, total, channels)
    sizes = batch, count, total, *hw_shape, core.window_size, shift_size, core.num_heads, channels
    _call('attend', *map(_single, tensors), out, ids, *sizes, core.scale)
    return out.to(qkv.dtype)


def convolve(
    x: Tensor,
    blank: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    hw_shape: tuple[int, int],
    rows: Rows,
) -> Tensor:
    """``Reference.convolve`` of some rows."""
    tensors = x, blank, weight.flatten(1).t(), bias
    out, ids = torch.empty(x.shape), rows.ids.expand(len(x), -1).contiguous()
    sizes = *x.shape[:2], *hw_shape, weight.shape[-1], x.shape[2]
    _call('convolve', *map(_single, tensors), out, ids, *sizes)
    return out.to(x.dtype)


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


def _single(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


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
