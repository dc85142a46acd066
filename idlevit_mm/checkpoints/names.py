"""What a name in the pickle of a checkpoint means: the one list of what is trusted."""

from __future__ import annotations

import collections
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from ..errors import shown

# torch.save writes a function that lives in a class as `getattr(class, name)`. These are the ones
# that mmengine stores; getattr itself would let a file reach any attribute of any safe object.
STORED_METHODS: dict[Any, frozenset[str]] = {
    HistoryBuffer: frozenset({'min', 'max', 'mean', 'current'}),
    OneCycleParamScheduler: frozenset({'_annealing_cos', '_annealing_linear'}),
}
# What mmengine stores the names of; only a buffer is made anew, and then without arguments.
NAMED = [
    *STORED_METHODS,
    *(getattr(owner, name) for owner, names in STORED_METHODS.items() for name in names),
]
# numpy 1 writes numpy.core, numpy 2 writes numpy._core; both must be readable under either.
_NUMPY_MODULES = ('numpy.core.multiarray', 'numpy._core.multiarray')
_NATIVE = ('|', '=', '<' if sys.byteorder == 'little' else '>')


class ForeignContentsError(pickle.UnpicklingError):
    """There is something in a checkpoint that is not read; the message names it."""


def _stored_method(owner: Any, name: Any) -> Any:
    """Stand in for ``getattr``; knows mmengine's own methods only."""
    if isinstance(owner, type) and isinstance(name, str) and name in STORED_METHODS.get(owner, ()):
        return getattr(owner, name)
    raise ForeignContentsError(f'getattr({getattr(owner, "__name__", "an object")}, {shown(name)})')


def _plain_dtype(code: Any, *_: Any) -> np.dtype:
    """Stand in for ``numpy.dtype``: numbers and texts, no fields and no objects.

    An object in an array is an address, and one that a file chose is followed when it is read.
    numpy's own dtypes of numbers are given out, not copies, as nothing can be built into those.
    """
    if isinstance(code, str) and re.fullmatch(r'[biufc]\d{1,2}|[US][1-9]\d{0,5}', code):
        return np.dtype(code)
    raise ForeignContentsError(f'numpy.dtype({shown(code)})')


def _empty_array(*_: Any) -> np.ndarray:
    """Stand in for numpy's ``_reconstruct``; shape and numbers come later."""
    return np.empty(0, np.int8)


def _plain_scalar(dtype: Any, raw: Any = None) -> Any:
    """Stand in for numpy's ``scalar``."""
    if isinstance(dtype, np.dtype) and isinstance(raw, bytes) and len(raw) == dtype.itemsize > 0:
        return np.frombuffer(raw, dtype)[0]
    raise ForeignContentsError('a numpy scalar that is no plain number')


def _build_array(array: np.ndarray, state: Any) -> None:
    _, _, dtype, _, raw = state
    if not isinstance(dtype, np.dtype) or not isinstance(raw, bytes):
        raise ForeignContentsError('a numpy array of objects')
    try:
        array.__setstate__(state)
    except (TypeError, ValueError) as error:
        raise ForeignContentsError('a numpy array of another size than its numbers') from error


def build_dtype(_: np.dtype, state: Any) -> None:
    """Check that nothing is added to a dtype, which is whole already."""
    if state[1] not in _NATIVE or any(state[2:5]):
        raise ForeignContentsError('a numpy.dtype with fields, parts or another byte order')


def _build_attributes(instance: Any, state: Any) -> None:
    if isinstance(state, dict):
        vars(instance).update(state)


def _build_history(buffer: HistoryBuffer, state: Any) -> None:
    _build_attributes(buffer, state)
    # The class knows its own methods from the first buffer on that was made by calling it.
    buffer._set_default_statistics()


def _uncalled(*_: Any) -> None:
    """Stand in for the classes that are named as the kind of a tensor or array."""
    raise ForeignContentsError('a tensor or array made by its class')


class Inert:
    """Takes the place of every object that is not understood, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def __getattr__(self, name: str) -> Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Storage(NamedTuple):
    """The bytes of tensors, and what they are numbers of."""

    data: torch.UntypedStorage
    dtype: torch.dtype


# What mmengine writes beside what torch's own safe reader knows.
MMENGINE: dict[str, Any] = {
    **{f'{cls.__module__}.{cls.__qualname__}': cls for cls in STORED_METHODS},
    'builtins.getattr': _stored_method,
    'numpy.dtype': _plain_dtype,
    'numpy.ndarray': _uncalled,
    **{f'{module}._reconstruct': _empty_array for module in _NUMPY_MODULES},
    **{f'{module}.scalar': _plain_scalar for module in _NUMPY_MODULES},
}
KNOWN: dict[str, Any] = {
    **MMENGINE,
    'torch.Tensor': _uncalled,
    'torch.nn.parameter.Parameter': _uncalled,
    'collections.OrderedDict': collections.OrderedDict,
    'collections.Counter': collections.Counter,
    'builtins.set': set,
    'builtins.complex': complex,
    '_codecs.encode': lambda text, *_: text.encode('latin1') if isinstance(text, str) else b'',
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    'torch.storage.UntypedStorage': torch.uint8,
    **{str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)},
    **{
        f'torch.{place}{name}': dtype
        for dtype, name in torch.storage._dtype_to_storage_type_map().items()
        for place in ('', 'cuda.')
        if not name.startswith('Q')
    },
}
# What is done with the state that a pickle has for an object, by the exact type of the object.
BUILD: dict[type, Callable[[Any, Any], None]] = {
    collections.OrderedDict: _build_attributes,
    HistoryBuffer: _build_history,
    np.ndarray: _build_array,
}
