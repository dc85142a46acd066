"""The ways from a checkpoint to code that torch and mmengine have of their own, closed.

What holds for the tools holds for the whole process from ``import idlevit_mm`` on: for
``load_from``, other backbones, the runners of mmengine and the inferencers of mmdet and mmseg.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import types
from typing import Any

import mmengine.infer.infer
import mmengine.runner._flexible_runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from ..errors import UsageError
from .safe_load import read
from .unpickling import NUMPY_MODULES, empty_array, plain_dtype, plain_scalar, stored_method

_ARRAY = object()
_NUMBERS = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')
# A config has some ten thousand characters.
_LONGEST_CONFIG = 2**20


def mmengine_globals() -> list[Any]:
    """Everything besides tensors that a checkpoint written by mmengine may name.

    For ``torch.load`` itself, which the package does not use. It has no say in what becomes of a
    dtype's state: numbers of another byte order than this machine's come out wrong.

    Returns:
        Entries for :func:`torch.serialization.add_safe_globals`: classes, or pairs of an object
        and the full name under which a checkpoint refers to it.
    """
    entries: list[Any] = [
        HistoryBuffer,
        OneCycleParamScheduler,
        (stored_method, 'builtins.getattr'),
        (_ARRAY, 'numpy.ndarray'),
        (plain_dtype, 'numpy.dtype'),
    ]
    for module in NUMPY_MODULES:
        entries += [(empty_array, f'{module}._reconstruct'), (plain_scalar, f'{module}.scalar')]
    # torch asks for these when it restores the state of an array or dtype. No file may name them:
    # a name in a pickle ends with its line.
    kinds: list[type] = [np.ndarray, *(type(np.dtype(code)) for code in _NUMBERS)]
    return entries + [(kind, f'numpy\n{kind.__qualname__}') for kind in kinds]


def allow_mmengine_globals() -> None:
    """Let torch's safe reader accept the checkpoints that mmengine writes, and mmengine run none.

    Adds to a list that belongs to the process; it may be called any number of times and takes
    nothing away. ``import idlevit_mm`` calls it, so a script of one's own that imports the
    package, or a config with ``custom_imports=dict(imports=['idlevit_mm'])``, can resume and test
    as well. mmengine's loaders, and those of onedl-mmengine, which would read what is refused by
    the unsafe reader, go by :func:`idlevit_mm.checkpoints.safe_load.read`; a resumed runner reads
    the config in a checkpoint as data; an inferencer refuses it. torch < 2.4 has no list.
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
    """The settings in the text of a config, read as data; stands in for ``Config.fromstring``.

    mmengine compares some with those of the run that goes on. Nothing in the text runs: what is
    not written out as numbers, texts, lists and ``dict(...)`` is left out.

    Args:
        text: As found in a checkpoint; anything.
        file_format: Kind of config; ``'.py'`` is the only one that mmengine stores.
    """
    settings: dict[str, Any] = {}
    if not isinstance(text, str) or len(text) > _LONGEST_CONFIG:
        print_log('The config in the checkpoint is no text of a config and is left out.', 'current')
        return settings
    try:
        lines = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        kind = type(error).__name__
        print_log(f'The config in the checkpoint is not read: {kind}.', 'current')
        return settings
    for line in lines:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            with contextlib.suppress(ValueError, TypeError, MemoryError, RecursionError):
                settings[line.targets[0].id] = _data(line.value)
    gpus = settings.get('gpu_ids')
    if not isinstance(gpus, (list, tuple, range)):
        settings.pop('gpu_ids', None)  # mmengine counts them
    return settings


def _data(node: ast.expr) -> Any:
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_data(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == 'dict' and not node.args and all(k.arg for k in node.keywords):
            return {str(keyword.arg): _data(keyword.value) for keyword in node.keywords}
        if node.func.id == 'range' and len(node.args) <= 2:
            return range(*(ast.literal_eval(number) % 2**16 for number in node.args))
    return ast.literal_eval(node)
