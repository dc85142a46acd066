"""The ways from a checkpoint to code that torch and mmengine have of their own, closed.

What holds for the tools holds for the whole process from ``import idlevit_mm`` on: for
``load_from``, other backbones, the runners of mmengine and the inferencers of mmdet and mmseg.
"""

from __future__ import annotations

import ast
import functools
import types
from typing import Any

import mmengine.infer.infer
import mmengine.runner._flexible_runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import numpy as np
import torch

from ..errors import UsageError
from .names import MMENGINE
from .safe_load import read

_NUMBERS = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')
# Letters of the longest config that is looked into, and GPUs of the longest range.
_LONGEST, _MOST_GPUS = 2**20, 10**6


def mmengine_globals() -> list[Any]:
    """Everything besides tensors that a checkpoint written by mmengine may name.

    For ``torch.load`` itself, which the package does not use. It has no say in what becomes of a
    dtype's state: numbers of another byte order than this machine's come out wrong.
    """
    # torch asks for these when it restores the state of an array or dtype. No file may name them:
    # a name in a pickle ends with its line.
    kinds: list[type] = [np.ndarray, *(type(np.dtype(code)) for code in _NUMBERS)]
    return [
        *((known, name) for name, known in MMENGINE.items()),
        *((kind, f'numpy\n{kind.__qualname__}') for kind in kinds),
    ]


def allow_mmengine_globals() -> None:
    """Let torch's safe reader accept the checkpoints that mmengine writes, and mmengine run none.

    ``import idlevit_mm`` calls it; it may be called any number of times and takes nothing away.
    mmengine's loaders, and those of onedl-mmengine, which would read what is refused by the unsafe
    reader, go by :func:`idlevit_mm.checkpoints.safe_load.read`; a resumed runner reads the config
    in a checkpoint as data; an inferencer refuses it. torch < 2.4 has no list.
    """
    if hasattr(torch.serialization, 'add_safe_globals'):
        torch.serialization.add_safe_globals(mmengine_globals())
    loaders = mmengine.runner.checkpoint
    loaders.torch = _instead(torch, load=_load)
    if hasattr(loaders, '_safe_torch_load'):
        loaders._safe_torch_load = _load
    config = types.SimpleNamespace(fromstring=settings_of)
    for module in (mmengine.runner.runner, mmengine.runner._flexible_runner):
        module.mmengine = _instead(mmengine, Config=config)
    inferencer = mmengine.infer.infer.BaseInferencer
    if not hasattr(inferencer._init_model, '__wrapped__'):
        inferencer._init_model = _with_a_config(inferencer._init_model)


def _instead(module: types.ModuleType, **names: Any) -> types.ModuleType:
    """A module for one of mmengine's to use in place of another, of which some names differ."""
    found = types.ModuleType(module.__name__, module.__doc__)
    vars(found).update(names, __getattr__=functools.partial(getattr, module))
    return found


def _load(file: Any, map_location: Any = None, *_: Any, **__: Any) -> Any:
    """Stand in for the function that all of mmengine's loaders read with."""
    return read(file, map_location)


def _with_a_config(build: Any) -> Any:
    """Have inferencers refuse the config in a checkpoint: text that would run."""

    @functools.wraps(build)
    def checked(self: Any, cfg: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        if not cfg:
            raise UsageError(
                f'{type(self).__name__}(weights={str(weights)!r}) without a config: the one in a '
                'checkpoint is Python text and does not run by itself. Look at it and pass it: '
                f'python tools/model_converters/print_config.py {weights} > config.py, then '
                "model='config.py'"
            )
        return build(self, cfg, weights, *args, **kwargs)

    return checked


def settings_of(text: Any, file_format: str = '.py') -> dict[str, Any]:
    """The settings in a config that mmengine compares with those of the run that goes on.

    Stands in for ``Config.fromstring``: there is one such setting, ``gpu_ids``, of which only the
    number counts.
    """
    gpus = config_as_data(text).get('gpu_ids')
    if not isinstance(gpus, (list, range)) or len(gpus) >= _MOST_GPUS:
        return {}
    return {'gpu_ids': gpus} if all(type(gpu) is int for gpu in gpus) else {}


def config_as_data(text: Any) -> dict[str, Any]:
    """The settings in the text of a config, of which nothing runs; none if it is no such text.

    What is no plain value is given as the text of its expression.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        return {}
    try:
        return {
            target.id: _value(statement.value)
            for statement in ast.parse(text).body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return {}


def _value(node: ast.expr) -> Any:
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {str(_value(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == 'dict' and not node.args:
            return {str(word.arg): _value(word.value) for word in node.keywords}
        if node.func.id == 'range' and len(node.args) <= 2 and not node.keywords:
            return range(*map(ast.literal_eval, node.args))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node)
