"""Counts what a piece of code asks of PyTorch, without a clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that copy what they read and compute nothing.
COPIES = frozenset(
    f'aten::{name}'
    for name in (
        'clone',
        'copy_',
        'copy',
        '_to_copy',
        'cat',
        'stack',
        'index',
        'index_select',
        'index_copy',
        'index_copy_',
        'index_put',
        'index_put_',
        'index_fill',
        'gather',
        'scatter',
        'scatter_',
        'constant_pad_nd',
        'im2col',
        'roll',
        'masked_fill',
        'where',
        'fill_',
        'zero_',
        'new_zeros',
        'zeros_like',
    )
)
# Those that add by index; index_put does where it accumulates.
INDEX_ADDITIONS = frozenset(
    f'aten::{name}'
    for name in (
        'index_add',
        'index_add_',
        'scatter_add',
        'scatter_add_',
        'embedding_dense_backward',
        'col2im',
    )
)
MATRIX_PRODUCTS = frozenset(('aten::addmm', 'aten::mm'))


class Operations(TorchDispatchMode):
    """Records operations while it is active; views are none.

    Attributes:
        counts: How often each operation ran, by name.
        copied: Sizes, in numbers, of the results of operations that only copy.
        index_additions: How many operations added to places that an index names.
        products: Multiply-adds of each plain matrix product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copied: list[int] = []
        self.index_additions = 0
        self.products: list[int] = []

    @property
    def launches(self) -> int:
        """Number of operations that read or write numbers."""
        return sum(self.counts.values())

    def copies_of_at_least(self, numbers: int) -> int:
        """How many copies have results of at least so many numbers."""
        return sum(size >= numbers for size in self.copied)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        old = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        fresh = [out for out in outputs if out.untyped_storage().data_ptr() not in old]
        in_place = func._schema.is_mutable
        if not fresh and not in_place:
            return result
        name = func.name().split('.')[0]
        self.counts[name] += 1
        if name in COPIES:
            self.copied += [out.numel() for out in outputs]
        if name in INDEX_ADDITIONS or ('index_put' in name and True in args[3:4]):
            self.index_additions += 1
        if name in MATRIX_PRODUCTS:
            left, right = inputs[-2:]
            self.products.append(left.numel() * right.shape[1])
        return result


def count(function: Any, *args: Any, gradients: bool = False) -> Operations:
    """Count the operations of a call; those of a backward pass within it too."""
    with torch.set_grad_enabled(gradients), Operations() as operations:
        function(*args)
    return operations
