"""Bytes that a call moves and kernels that it launches, as a GPU would: operation by operation.

An operation reads its inputs and writes its results; views are free, and so is what only
allocates. Of what it gathers from or scatters to only the rows count that it touches. Operators of
this package tell what they touch (``idlevit_mm.kernels.TRAFFIC``). Caches are not modelled: what
two operations read counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idlevit_mm.kernels import TRAFFIC

# Of their first tensor these read or write rows that others name.
_READ_ROWS = frozenset(('index_select', 'gather', 'index', 'embedding'))
_WRITE_ROWS = frozenset(
    ('index_copy', 'scatter', 'index_put', 'index_fill', 'scatter_add', 'index_add')
)
_OVERWRITE = frozenset(('copy_', 'fill_', 'zero_'))


class Traffic(TorchDispatchMode):
    """Counts the operations that run while it is active, on whatever device.

    Attributes:
        bytes: Read and written, by the name of the operation.
        operations: How often each ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    @property
    def kernels(self) -> int:
        """How many operators of this package ran."""
        return sum(n for name, n in self.operations.items() if name.startswith('idlevit_mm::'))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        result = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [x for x in _tensors(result) if x.untyped_storage()._cdata not in known]
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
        given.update(kwargs)
        written = _tensors([given.get(a.name) for a in schema.arguments if a.is_write])
        name = schema.name.split('::')[1]
        if (fresh or written) and not name.startswith(('empty', 'new_empty')):
            if schema.name in TRAFFIC:
                moved = sum(TRAFFIC[schema.name](*args, **kwargs))
            else:
                moved = _moved(name, inputs, written, fresh)
            self.bytes[schema.name] += moved
            self.operations[schema.name] += 1
        return result


def _tensors(tree: Any) -> list[Tensor]:
    """Tensors in something nested, each once."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


def _moved(name: str, inputs: list[Tensor], written: list[Tensor], fresh: list[Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    results = _size(fresh)
    if name in _READ_ROWS:
        return _size(inputs[1:]) + 2 * results
    plain = name.removesuffix('_')
    if plain in _WRITE_ROWS:
        rows = max((_size([x]) for x in inputs[1:] if x.is_floating_point()), default=0)
        # Where there is no source, so many places as there are indices are filled.
        rows = rows or inputs[0].element_size() * max(x.numel() for x in inputs[1:])
        copied = 0 if written else _size(inputs[:1]) + results
        return _size(inputs[1:]) + rows * (2 if plain.endswith('add') else 1) + copied
    unread = {id(x) for x in written} if name in _OVERWRITE else set()
    return _size(x for x in inputs if id(x) not in unread) + _size(written) + results


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes that lie in memory: of a dimension that is only expanded one element."""
    return sum(
        x.element_size()
        * prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step or not n)
        for x in tensors
    )


def launches(call: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each kernel and copy that a call has a GPU run, by name, as torch sees them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA:
            seconds.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    return seconds
