"""Reading checkpoints of this machine without running code that they carry.

A checkpoint is a pickle, and a pickle may call any function of any module. torch >= 2.6 therefore
reads with ``weights_only=True``, which refuses everything but tensors and plain containers, and
with it the checkpoints of mmengine 0.10, whose log histories are numpy arrays in a class of its
own. :func:`allow_mmengine_globals` adds exactly those classes to torch's list of safe ones;
nothing here switches the safe reader off. The fork onedl-mmengine does so by itself when the safe
reader refuses a file; that way back is closed.
"""

from __future__ import annotations

import collections
import importlib
import os
import pickle
import re
import types
import warnings
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from ..errors import (
    BrokenCheckpointError,
    MissingFileError,
    UnsafeCheckpointError,
    UsageError,
    one_line,
    shortened,
)
from .weights import PLACES, place_of_weights, weights_of

SAFETENSORS = '.safetensors'

# torch.save writes a function that lives in a class as `getattr(class, name)`. These are the ones
# that mmengine stores; getattr itself would let a file reach any attribute of any safe object.
_STORED_METHODS: dict[type, frozenset[str]] = {
    HistoryBuffer: frozenset({'min', 'max', 'mean', 'current'}),
    OneCycleParamScheduler: frozenset({'_annealing_cos', '_annealing_linear'}),
}

# numpy 1 writes numpy.core, numpy 2 writes numpy._core; both must be readable under either.
_NUMPY_FUNCTIONS = ('_reconstruct', 'scalar')
_NUMPY_MODULES = ('numpy.core.multiarray', 'numpy._core.multiarray')
_NUMPY_DTYPES = [
    'bool',
    'int8',
    'int16',
    'int32',
    'int64',
    'uint8',
    'uint16',
    'uint32',
    'uint64',
    'float16',
    'float32',
    'float64',
    'str',
]


def _stored_method(owner: type, name: str) -> Any:
    """Stand in for ``getattr`` while a checkpoint is read; knows mmengine's own methods only."""
    if name in _STORED_METHODS.get(owner, ()):
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'Unsupported global: GLOBAL getattr({owner!r}, {name!r}) is not one of the methods that '
        'mmengine stores in a checkpoint.'
    )


def mmengine_globals() -> list[Any]:
    """Everything besides tensors that a checkpoint written by mmengine may name.

    Returns:
        Entries for :func:`torch.serialization.add_safe_globals`: classes, or pairs of an object
        and the full name under which a checkpoint refers to it.
    """
    multiarray = importlib.import_module(_NUMPY_MODULES[hasattr(np, '_core')])
    entries: list[Any] = [
        HistoryBuffer,
        OneCycleParamScheduler,
        (_stored_method, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
    ]
    for function in _NUMPY_FUNCTIONS:
        entries += [(getattr(multiarray, function), f'{m}.{function}') for m in _NUMPY_MODULES]
    # The class of a dtype object: torch looks it up before it restores the object's state.
    for name in _NUMPY_DTYPES:
        dtype = type(np.dtype(name))
        entries.append((dtype, f'{dtype.__module__}.{dtype.__qualname__}'))
    return entries


def _read_strictly(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Stand in for the function that all of onedl-mmengine's loaders read with."""
    strict = True if weights_only is None else weights_only
    return torch.load(file, map_location=map_location, weights_only=strict)


def _close_the_way_back() -> None:
    """Keep onedl-mmengine from reading a refused checkpoint again, by the unsafe reader.

    Its own function also lets a checkpoint use ``getattr`` on anything, and when it is done it
    takes those classes off torch's list that :func:`allow_mmengine_globals` has added. OpenMMLab's
    mmengine has no such function.
    """
    if hasattr(mmengine.runner.checkpoint, '_safe_torch_load'):
        mmengine.runner.checkpoint._safe_torch_load = _read_strictly


def allow_mmengine_globals() -> None:
    """Let torch's safe reader accept the checkpoints that mmengine writes.

    Adds to a list that belongs to the process; it may be called any number of times and takes
    nothing away. ``import idlevit_mm`` calls it, so a script of one's own that imports the
    package, or a config with ``custom_imports=dict(imports=['idlevit_mm'])``, can resume and test
    as well. With onedl-mmengine, whose loaders would read what this list refuses by the unsafe
    reader, they refuse it too. torch < 2.4 has no such list and needs none: its own default is the
    unsafe reader.
    """
    if hasattr(torch.serialization, 'add_safe_globals'):
        torch.serialization.add_safe_globals(mmengine_globals())
        _close_the_way_back()


def _foreign_globals(path: str | os.PathLike, reason: str) -> list[str]:
    """Names in the checkpoint that the safe reader does not know."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # another format, or damaged: the reader's own words are all there is
        found = []
    if not found:
        found = re.findall(r'GLOBAL (\S+(?:\(.*?\))?)', reason)
    return sorted(set(found))


def load_checkpoint(path: str | os.PathLike, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint of this machine; tensors and mmengine's records only.

    Args:
        path: File written by ``torch.save``, or a ``.safetensors`` file.
        map_location: As in :func:`torch.load`.

    Returns:
        The checkpoint, or the bare state dict if the file is one.

    Raises:
        MissingFileError: If there is no such file.
        UnsafeCheckpointError: If the file holds any other class or function.
        BrokenCheckpointError: If it is no checkpoint, or an incomplete one.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = 'is a folder, not a file' if path.is_dir() else 'does not exist'
        raise MissingFileError(f'checkpoint {path} {what}')
    allow_mmengine_globals()
    try:
        if path.suffix == SAFETENSORS:
            return safetensors_torch().load_file(path, device=str(map_location))
        # Mapped, not read: most callers look at names and shapes only.
        checkpoint = torch.load(
            path, map_location=map_location, weights_only=True, mmap=_is_zip(path) or None
        )
    except UsageError:
        raise
    except Exception as error:
        raise reading_error(path, error) from error
    if not isinstance(checkpoint, dict):
        raise BrokenCheckpointError(
            f'checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary of tensors'
        )
    return checkpoint


def safetensors_torch() -> Any:
    """The module ``safetensors.torch``, which comes with timm, not with OpenMMLab.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module('safetensors.torch')
    except ImportError as error:
        raise UsageError(
            f'{SAFETENSORS} files need safetensors, which cannot be imported: {error}'
        ) from error


def reading_error(source: str | os.PathLike, error: Exception) -> UsageError:
    """What the reader's error means: a checkpoint that is not safe, or one that is damaged.

    Args:
        source: File or address of the checkpoint.
        error: As torch or safetensors raised it.
    """
    reason = str(error)
    foreign = _foreign_globals(source, reason)
    if foreign or 'Trying to call reduce' in reason or 'Can only' in reason:
        names = shortened(foreign) or one_line(error, 200)
        return UnsafeCheckpointError(
            f'checkpoint {source} is refused as unsafe: it holds {names}, and reading such '
            'things can run code. Only tensors and the records of mmengine are read. To use the '
            'weights, drop everything else first: python '
            f'tools/model_converters/strip_checkpoint.py {source} stripped.pth'
        )
    return BrokenCheckpointError(
        f'checkpoint {source} cannot be read ({one_line(error, 200)}): the file is incomplete, '
        'damaged, or no checkpoint'
    )


def _is_zip(path: Path) -> bool:
    with open(path, 'rb') as file:
        return file.read(4) == b'PK\x03\x04'


class _Inert:
    """Takes the place of every object that is not understood, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def update(self, *items: Any) -> None:
        pass


_REBUILD = re.compile(r'_rebuild_(parameter|tensor|tensor_v2|parameter_with_state)')


class _InertUnpickler(pickle.Unpickler):
    """Resolves tensors and ordered dictionaries; every other name becomes :class:`_Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('collections', 'OrderedDict'):
            return collections.OrderedDict
        if (module, name) == ('_codecs', 'encode'):
            return _encode_latin1
        if module == 'torch._utils' and _REBUILD.fullmatch(name):
            return getattr(torch._utils, name)
        if (module, name) in {('torch', 'Size'), ('torch', 'device')}:
            return getattr(torch, name)
        if (module, name) in {('torch.nn.parameter', 'Parameter'), ('torch', 'Tensor')}:
            return torch.nn.Parameter if name == 'Parameter' else torch.Tensor
        if module in ('torch', 'torch.storage') and name.endswith('Storage'):
            return getattr(importlib.import_module(module), name)
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Inert


def _encode_latin1(text: Any, *_: Any) -> bytes:
    return text.encode('latin1') if isinstance(text, str) else b''


def strip_checkpoint(source: str | os.PathLike, target: str | os.PathLike) -> tuple[int, list[str]]:
    """Write the weights of a checkpoint, and nothing else, to a new file.

    Names of classes and functions in the source are never resolved, so none of its code can run;
    a file need not be trusted.

    Args:
        source: Checkpoint of any origin. The weights are looked for under ``state_dict``,
            ``model``, ``module`` or at the top.
        target: File to write: ``{'state_dict': {name: tensor}}``. It must not exist.

    Returns:
        Number of tensors written, and the keys beside the weights that were dropped.

    Raises:
        UsageError: If the source is missing, the target exists, or there are no tensors.
        BrokenCheckpointError: If the source cannot be read.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise MissingFileError(f'checkpoint {source} does not exist')
    if target.exists():
        raise UsageError(f'{target} exists already; choose another name')
    reader = types.SimpleNamespace(
        __name__='inert', Unpickler=_InertUnpickler, load=lambda f, **k: _InertUnpickler(f).load()
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            checkpoint = torch.load(
                source, map_location='cpu', pickle_module=reader, weights_only=False
            )
    except Exception as error:
        raise BrokenCheckpointError(
            f'checkpoint {source} cannot be read ({one_line(error, 200)})'
        ) from error

    place = place_of_weights(checkpoint) if isinstance(checkpoint, dict) else ''
    dropped = [str(key) for key in checkpoint if key != place] if place else []
    tensors = {key: value.detach().clone() for key, value in weights_of(checkpoint).items()}
    if not tensors:
        raise UsageError(f'checkpoint {source} holds no tensors under {", ".join(PLACES)}')
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'state_dict': tensors}, target)
    return len(tensors), dropped
