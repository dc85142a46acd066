"""What the names in the pickle of a checkpoint mean: the one place that decides what is trusted.

A pickle names classes and functions to be called. Here a name is looked up in a list, never in a
module; what the list lacks becomes an object that does nothing, and is noted. Neither tensors nor
arrays get more memory than the file has bytes for.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

# torch.save writes a function that lives in a class as `getattr(class, name)`. These are the ones
# that mmengine stores; getattr itself would let a file reach any attribute of any safe object.
_STORED_METHODS: dict[Any, frozenset[str]] = {
    HistoryBuffer: frozenset({'min', 'max', 'mean', 'current'}),
    OneCycleParamScheduler: frozenset({'_annealing_cos', '_annealing_linear'}),
}
# What mmengine stores the names of; only a buffer is made anew, and then without arguments.
_NAMED = [
    *_STORED_METHODS,
    *(getattr(owner, name) for owner, names in _STORED_METHODS.items() for name in names),
]
# numpy 1 writes numpy.core, numpy 2 writes numpy._core; both must be readable under either.
_NUMPY_MODULES = ('numpy.core.multiarray', 'numpy._core.multiarray')
_NATIVE = ('|', '=', '<' if sys.byteorder == 'little' else '>')


class ForeignContentsError(pickle.UnpicklingError):
    """There is something in a checkpoint that is not read; the message names it."""


def _stored_method(owner: Any, name: Any) -> Any:
    """Stand in for ``getattr``; knows mmengine's own methods only."""
    if isinstance(owner, type) and isinstance(name, str) and name in _STORED_METHODS.get(owner, ()):
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


def _build_dtype(_: np.dtype, state: Any) -> None:
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


class _Storage(NamedTuple):
    data: torch.UntypedStorage
    dtype: torch.dtype


# What mmengine writes beside what torch's own safe reader knows.
MMENGINE: dict[str, Any] = {
    **{f'{cls.__module__}.{cls.__qualname__}': cls for cls in _STORED_METHODS},
    'builtins.getattr': _stored_method,
    'numpy.dtype': _plain_dtype,
    'numpy.ndarray': _uncalled,
    **{f'{module}._reconstruct': _empty_array for module in _NUMPY_MODULES},
    **{f'{module}.scalar': _plain_scalar for module in _NUMPY_MODULES},
}
_KNOWN: dict[str, Any] = {
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
_BUILD: dict[type, Callable[[Any, Any], None]] = {
    collections.OrderedDict: _build_attributes,
    HistoryBuffer: _build_history,
    np.ndarray: _build_array,
}
# pickle.Unpickler itself is in C: it has no say in what is built, and gives a name that a file
# chooses for an object ("memo") as much memory as its number asks for.
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]


class Unpickler(_Base):
    """Reads what ``torch.save`` pickled, and runs nothing of it.

    Args:
        file: Where the pickle is.
        storage: Gives a tensor's storage by key, location and size in bytes; None for no tensor.
        budget: Bytes that all tensors may have, each counted as if it shared none.
        trusted: More classes and functions by their full names, which are called.

    Attributes:
        foreign: What was passed over, by name.
    """

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[str, str, int], torch.UntypedStorage | None],
        budget: int = 0,
        trusted: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(file, encoding='utf-8')
        self.foreign: set[str] = set()
        self._storage = storage
        self._budget = budget
        self._trusted = trusted or {}
        self._known = {
            **self._trusted,
            **{name: self._noting(known) for name, known in _KNOWN.items()},
            **{f'torch._utils._rebuild_tensor{n}': self._tensor for n in ('', '_v2', '_v3')},
            'torch._utils._rebuild_parameter': self._parameter,
            'torch._utils._rebuild_parameter_with_state': self._parameter,
            'torch._tensor._rebuild_from_type_v2': lambda rebuild, _, args, __: rebuild(*args),
        }

    def find_class(self, module: str, name: str) -> Any:
        """What a name means; :class:`Inert` if nothing."""
        full = f'{module.replace("__builtin__", "builtins")}.{name}'  # as Python 2 had it
        if full not in self._known:
            self.foreign.add(shown(full))
        return self._known.get(full, Inert)

    def persistent_load(self, pid: Any) -> Any:
        """The storage of a tensor."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or text_of(pid[0]) != 'storage':
            self.foreign.add('the source code of a module')
            return Inert()
        _, dtype, key, location, count, *part = pid
        if not isinstance(dtype, torch.dtype):
            return Inert()  # its name is noted
        if any(part) or type(count) is not int or count < 0:
            raise ForeignContentsError('a storage that is a part of another, or without a size')
        size = count * size_of(dtype)
        data = self._storage(text_of(key), text_of(location), size)
        if data is None:
            return Inert()
        if size > data.nbytes():
            raise ForeignContentsError('a storage of which only a part is there')
        return _Storage(data, dtype)

    def load_build(self) -> None:
        """Give the object on top its state, if it is one that may have any."""
        state, instance = self.stack[-1], self.stack[-2]
        build = _build_dtype if isinstance(instance, np.dtype) else _BUILD.get(type(instance))
        if build is not None:
            self._noting(build)(instance, state)
        elif type(instance) in self._trusted.values():
            super().load_build()
            return
        elif not isinstance(instance, Inert):
            self.foreign.add(f'a state of {type(instance).__name__}')
        self.stack.pop()

    def load_reduce(self) -> None:
        """Call a function, if it is one to be called."""
        if any(self.stack[-2] is named for named in _NAMED):
            self.foreign.add(f'a call of {self.stack[-2].__qualname__}')
            self.stack[-2] = Inert
        super().load_reduce()

    dispatch = dict(_Base.dispatch)
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    # The first takes the memory that it declares, the others call; torch.save writes none of them.
    for code in (pickle.BYTEARRAY8, pickle.INST, pickle.OBJ):
        del dispatch[code[0]]

    def _noting(self, function: Any) -> Any:
        """Let a function of ours that refuses something pass over it; anything else stays."""
        if not isinstance(function, types.FunctionType):
            return function

        def noting(*args: Any) -> Any:
            try:
                return function(*args)
            except ForeignContentsError as error:
                self.foreign.add(str(error))
                return Inert()

        return noting

    def _tensor(
        self,
        storage: Any,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        hooks: Any = None,
        *more: Any,
    ) -> Any:
        if not isinstance(storage, _Storage):
            return Inert()
        data, dtype = storage
        for value in more:
            if isinstance(value, torch.dtype):
                dtype = value
            elif value:
                raise ForeignContentsError('a conjugated or negated view of a tensor')
        if not len(size) == len(stride) <= 64 or not all(
            type(number) is int and number >= 0 for number in (offset, *size, *stride)
        ):
            raise ForeignContentsError('a tensor without a shape')
        count = math.prod(size)
        last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if count and (offset + last + 1) * size_of(dtype) > data.nbytes():
            raise ForeignContentsError('a tensor that reaches beyond its storage')
        self._budget -= count * size_of(dtype)
        if self._budget < 0:
            raise ForeignContentsError('tensors of many times the bytes of the file')
        tensor = torch.empty(0, dtype=dtype, device=data.device).set_(data, offset, size, stride)
        return tensor.requires_grad_() if requires_grad is True else tensor

    def _parameter(self, data: Any, requires_grad: bool, *_: Any) -> Any:
        if not isinstance(data, torch.Tensor):
            return Inert()
        return torch.nn.Parameter(data, requires_grad is True)


def size_of(dtype: torch.dtype) -> int:
    """Bytes of a number."""
    return torch.empty(0, dtype=dtype).element_size()


def text_of(value: Any) -> str:
    """A text that may be in bytes."""
    if isinstance(value, bytes):
        return value.decode('ascii')
    if not isinstance(value, str):
        raise ForeignContentsError('a storage without a name')
    return value


def shown(value: Any) -> str:
    """What a file has as a name, for one line on a terminal.

    A tuple may hold itself in parts so often that no memory takes the text of it.
    """
    if not isinstance(value, str):
        return type(value).__name__
    return value if re.fullmatch(r'[\w.]{1,99}', value) else repr(value[:99])
