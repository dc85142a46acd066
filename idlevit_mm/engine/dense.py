"""Dense backbones in configs, and how their configs become those of their idle twins."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoints import compare
from ..converters import detect
from ..errors import UsageError, one_line, shortened
from ..registry import arguments_of, idle_backbones
from .checks import class_of, parts_of
from .launch import library_of

# Keys under which models hold a backbone.
_PLACES = ('backbone', 'encoder')
# Arguments that say where weights come from.
WEIGHTS = ('init_cfg', 'pretrained')


def twins() -> dict[tuple[str, str], str]:
    """Names of the idle classes by library and name of their dense twins."""
    found: dict[tuple[str, str], str] = {}
    for cls in idle_backbones():
        for dense in cls.DENSE:
            # A class that inherits from an idle one is the twin of no other.
            found.setdefault(dense, cls.__name__)
    return found


@dataclass(frozen=True)
class Backbone:
    """A part of a model that is a backbone, or whose class has an idle twin.

    Attributes:
        path: Keys that lead to it from the top of the config; numbers count in lists.
        config: Its config.
        library: Library of its class; '' where the config does not tell.
        dense: Name of its class, without scope.
    """

    path: tuple[str | int, ...]
    config: dict[str, Any]
    library: str
    dense: str

    @property
    def name(self) -> str:
        """Dotted name in the config."""
        return '.'.join(map(str, self.path))

    @property
    def kind(self) -> str:
        """Its class, with the library where that is known."""
        return '.'.join(filter(None, (self.library, self.dense)))

    @property
    def twin(self) -> str | None:
        """Name of the idle class with the same weights."""
        return twins().get((self.library, self.dense))

    @property
    def is_teacher(self) -> bool:
        """Whether others learn from it; such a network stays dense."""
        return any('teacher' in str(key) for key in self.path)


def find_backbones(cfg: Mapping[str, Any]) -> list[Backbone]:
    """Find all backbones of a resolved config's model, with and without idle twin."""
    found = []
    for path, part, scope in parts_of(cfg.get('model'), ('model',), cfg.get('default_scope')):
        if part.get('type') is None:
            continue
        library, dense = class_of(part['type'], scope)
        if not library and any(dense == name for _, name in twins()):
            library = library_of(cfg)
        key = next(str(key) for key in reversed(path) if isinstance(key, str))
        if (library, dense) in twins() or key.endswith(_PLACES):
            found.append(Backbone(path, part, library, dense))
    return found


def make_idle(
    backbone: Backbone, keep_ratios: Any, policy: Mapping[str, Any], idle_where: str = 'always'
) -> Any:
    """Give a backbone its idle class, and arguments with which that computes the same.

    Returns:
        The idle backbone, built without memory.

    Raises:
        UsageError: It has other arguments or weights than the dense one, or does not build.
    """
    kind, config, twin = f'{backbone.name} ({backbone.kind})', backbone.config, backbone.twin
    if any(isinstance(key, int) for key in backbone.path):
        why = 'which a config that inherits can replace only as a whole'
        raise UsageError(f'{kind} stands in a list, {why}')
    dense_class, idle_class = _dense_class(backbone), MODELS.get(twin)
    original = {key: value for key, value in config.items() if key not in ('type', '_scope_')}
    renamed = idle_class.RENAMED.get(backbone.dense, {})
    for old, new in renamed.items():
        if old in config:
            config[new] = config.pop(old)
    dense, idle = (
        {renamed.get(name, name): argument.default for name, argument in arguments_of(cls).items()}
        for cls in (dense_class, idle_class)
    )
    given = {renamed.get(key, key): value for key, value in original.items()}
    foreign = [name for name in given if name not in idle]
    different = (n for n in foreign if n not in dense or not _equal(given[n], dense[n]))
    if needed := [f'{name}={given[name]!r}' for name in different]:
        raise UsageError(f'{kind}: {twin} has no {", ".join(needed)}')
    _check_init_cfg(kind, twin, given.get('init_cfg'))

    for name in foreign:
        del config[name]
    for name, default in dense.items():
        if name in idle and name not in given and not _equal(default, idle[name]):
            config[name] = list(default) if isinstance(default, tuple) else default
    config |= dict(type=twin, keep_ratios=keep_ratios)
    config |= idle_class.AS_DENSE.get((backbone.library, backbone.dense), {})
    if policy:
        config['policy'] = dict(policy)
    if idle_where != 'always':
        config['idle_where'] = idle_where
    network = _built(f'{kind}: {twin}', idle_class, config)
    _check_weights(kind, _built(kind, dense_class, original), network)
    return network


def _dense_class(backbone: Backbone) -> type[nn.Module]:
    """The class that a config names, of a library or registered there by what the config imports.

    Raises:
        UsageError: The library cannot be imported, or lacks the class.
    """
    try:
        models = importlib.import_module(f'{backbone.library}.models')
    except ImportError as error:
        why = f'is a class of {backbone.library}, which cannot be imported: {error}'
        raise UsageError(f'{backbone.name} {why}') from error
    registry = importlib.import_module(f'{backbone.library}.registry').MODELS
    found = getattr(models, backbone.dense, None) or registry.get(backbone.dense)
    if found is None:
        why = f'{backbone.library} has not; allowed: custom_imports of the project that has it'
        raise UsageError(f'{backbone.name} is a {backbone.dense}, which {why}')
    return found


def _equal(first: Any, second: Any) -> bool:
    """Whether two settings are the same; lists and tuples are."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first == second


def _check_init_cfg(kind: str, twin: str | None, init_cfg: Any) -> None:
    """Check that the weights a dense backbone begins with can be those of the idle one."""
    if init_cfg is None:
        return
    if isinstance(init_cfg, Mapping) and init_cfg.get('checkpoint'):
        how = class_of(init_cfg.get('type', 'Pretrained'))[1].removesuffix('Init')
        prefix = str(init_cfg.get('prefix', 'backbone')).rstrip('.')
        if how == 'Pretrained' and prefix == 'backbone':
            return
    raise UsageError(
        f'{kind}: {twin} cannot begin with init_cfg={init_cfg!r}, only with a checkpoint; '
        '--load-from CHECKPOINT replaces it'
    )


class _OnMeta(TorchFunctionMode):
    """Lets modules be built without memory: parameters have shapes only.

    ``torch.device('meta')`` cannot: dense backbones read numbers back from ``torch.linspace``.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        meta = {'device': 'meta'} if func in (torch.empty, torch.zeros, torch.ones) else {}
        return func(*args, **{**(kwargs or {}), **meta})


def _built(kind: str, cls: type[nn.Module], config: Mapping[str, Any]) -> Any:
    """Build a backbone without memory."""
    without = ('type', '_scope_', *WEIGHTS)
    try:
        with _OnMeta():
            return cls(**{key: value for key, value in config.items() if key not in without})
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise UsageError(f'{kind} does not build: {one_line(error)}') from error


def _check_weights(kind: str, dense: nn.Module, idle: nn.Module) -> None:
    """Check that the weights of both have the same names and shapes."""
    theirs = dense.state_dict()
    if (found := detect(theirs, getattr(idle, 'family', ''))) is not None:
        # A class of a project may have other names.
        theirs = found.decode(theirs).state
    report = compare(idle.state_dict(), theirs, policy_too=False)
    shapes = {k: tuple(w.shape) for state in (theirs, idle.state_dict()) for k, w in state.items()}
    differ: dict[str, tuple[Any, Any]] = dict(report.mismatched)
    differ |= {name: (shapes[name], 'absent') for name in report.unexpected}
    differ |= {name: ('absent', shapes[name]) for name in report.missing}
    if differ:
        listed = [f'{name} is {a}, not {b}' for name, (a, b) in sorted(differ.items())]
        raise UsageError(
            f'{kind} has other weights than {type(idle).__name__}: {shortened(listed, 3, "; ")}'
        )
