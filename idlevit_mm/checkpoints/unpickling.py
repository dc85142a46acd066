"""Reads the pickle of a checkpoint.

A pickle names classes and functions to be called. Here a name is looked up in :mod:`.names`, never
in a module; what the list lacks becomes an object that does nothing, and is noted. No object gets
more memory than the file has bytes for.
"""

from __future__ import annotations

import collections
import math
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import shown
from .names import BUILD, KNOWN, NAMED, ForeignContentsError, Inert, Storage, build_dtype

_MOST_PARTS = 10_000  # of a key
# pickle.Unpickler itself is in C: it has no say in what is built, and gives a name that a file
# chooses for an object ("memo") as much memory as its number asks for.
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]


def _is_endless(key: Any) -> bool:
    """Whether a key has very many parts: hashing counts shared ones as often as they occur."""
    parts, waiting = 0, [key]
    while waiting and parts < _MOST_PARTS:
        one = waiting.pop()
        parts += 1
        if isinstance(one, (tuple, list)):
            waiting += one[:_MOST_PARTS]
    return bool(waiting)


def _checked(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Have an order pass over keys that take for ever to hash."""

    def checked(unpickler: Any) -> None:
        for place in range(*keys.indices(len(unpickler.stack))):
            if _is_endless(unpickler.stack[place]):
                unpickler.foreign.add('a key of very many parts')
                unpickler.stack[place] = Inert()
        load(unpickler)

    return checked


def _elements(arguments: Any) -> Any:
    return arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else ()


_HASHERS = (set, collections.Counter, collections.OrderedDict)
# Where on the stack is what is hashed, by the orders that do so.
_HASHING = {
    pickle.SETITEM[0]: slice(-2, -1),
    pickle.SETITEMS[0]: slice(0, None, 2),
    pickle.ADDITEMS[0]: slice(None),
    pickle.FROZENSET[0]: slice(None),
}


class Unpickler(_Base):
    """Reads what ``torch.save`` pickled, and runs nothing of it.

    Args:
        file: Where the pickle is.
        storage: Gives a tensor's storage by key, location and size in bytes; None for no tensor.
        budget: Bytes that all objects may have, each counted as if it shared nothing.
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
            **{name: self._noting(known) for name, known in KNOWN.items()},
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
        return Storage(data, dtype)

    def load_build(self) -> None:
        """Give the object on top its state, if it is one that may have any."""
        state, instance = self.stack[-1], self.stack[-2]
        if isinstance(state, tuple):
            self._spend(sum(len(part) for part in state if isinstance(part, bytes)))
        build = build_dtype if isinstance(instance, np.dtype) else BUILD.get(type(instance))
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
        if any(self.stack[-2] is named for named in NAMED):
            self.foreign.add(f'a call of {self.stack[-2].__qualname__}')
            self.stack[-2] = Inert
        if self.stack[-2] in _HASHERS and any(map(_is_endless, _elements(self.stack[-1]))):
            self.foreign.add('a key of very many parts')
            self.stack[-2] = Inert
        super().load_reduce()
        self._spend(sys.getsizeof(self.stack[-1]))

    dispatch = dict(_Base.dispatch)
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    for number, keys in _HASHING.items():
        dispatch[number] = _checked(dispatch[number], keys)
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
        if not isinstance(storage, Storage):
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
        self._spend(count * size_of(dtype))
        tensor = torch.empty(0, dtype=dtype, device=data.device).set_(data, offset, size, stride)
        return tensor.requires_grad_() if requires_grad is True else tensor

    def _spend(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            raise ForeignContentsError('objects of many times the bytes of the file')

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
