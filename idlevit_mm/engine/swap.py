"""Write a config of a user's config that has idle backbones in place of dense ones.

What ``tools/idle_config.py`` calls. Nothing is guessed: the dense backbone and its idle twin are
built without memory from the arguments of both configs and their weights compared, and what is
written is read again and compared with the user's config.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoints import compare
from ..errors import UsageError, one_line, shortened
from ..hooks import RandomKeepRatioHook
from ..registry import arguments_of, idle_backbones
from .checks import class_of, parts_of
from .launch import load_config, task_of

_LIBRARIES = {'detection': 'mmdet', 'segmentation': 'mmseg'}
# Keys under which models hold a backbone.
_PLACES = ('backbone', 'encoder')
_WEIGHTS = ('init_cfg', 'pretrained')

Differences = dict[str, tuple[Any, Any]]


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
    config: Mapping[str, Any]
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


@dataclass(frozen=True)
class Settings:
    """What a user wants of the idle config.

    Attributes:
        keep: Keep ratios of all backbones; see ``normalize_keep_ratios``.
        policy: Arguments of ``policy`` of the backbones; empty for the default.
        load_from: Checkpoint of the dense model to start from, in place of ``init_cfg``.
        distill: Whether the model of ``load_from`` is the teacher of the features.
        random_ratios: Lowest and highest keep ratio of an iteration.
    """

    keep: Any
    policy: Mapping[str, Any] = field(default_factory=dict)
    load_from: str | None = None
    distill: bool = False
    random_ratios: tuple[float, float] | None = None


@dataclass
class Changes:
    """What becomes of a config, by dotted names: what is dropped, is set, is added to lists."""

    drops: list[str] = field(default_factory=list)
    sets: dict[str, Any] = field(default_factory=dict)
    adds: dict[str, list[Any]] = field(default_factory=dict)

    def covers(self, name: str) -> bool:
        """Whether a difference is one of these changes, or inside of one."""
        meant = (*self.drops, *self.sets, *self.adds, 'custom_imports')
        return any(name == other or name.startswith(f'{other}.') for other in meant)


@dataclass(frozen=True)
class Swapped:
    """What was written.

    Attributes:
        file: The config.
        changed: Its differences from the user's config after both are resolved.
        left: Dotted names of backbones that have an idle twin and stay dense, as teachers do.
    """

    file: Path
    changed: Differences
    left: tuple[str, ...]


class _OnMeta(TorchFunctionMode):
    """Lets modules be built without memory: parameters have shapes only.

    ``torch.device('meta')`` cannot: dense backbones read numbers back from ``torch.linspace``.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def twins() -> dict[tuple[str, str], str]:
    """Names of the idle classes by library and name of their dense twins."""
    found: dict[tuple[str, str], str] = {}
    for cls in idle_backbones():
        for dense in cls.DENSE:
            # A class that inherits from an idle one is the twin of no other.
            found.setdefault(dense, cls.__name__)
    return found


def parse_keep(words: Iterable[str]) -> Any:
    """Read keep ratios from the command line: one number, one per stage, or a Python literal.

    Raises:
        UsageError: A word is neither a number nor a literal.
    """
    values = []
    for word in words:
        try:
            values.append(ast.literal_eval(word))
        except (ValueError, SyntaxError):
            raise UsageError(
                f'--keep {word}: allowed are a number in (0, 1], one number or list per stage, '
                "or a schedule such as \"{'type': 'powers', 'keep_ratio': 0.7}\""
            ) from None
    return values[0] if len(values) == 1 else values


def find_backbones(cfg: Mapping[str, Any]) -> list[Backbone]:
    """Find all backbones of a resolved config's model, with and without idle twin."""
    found = []
    for path, part, scope in parts_of(cfg.get('model'), ('model',), cfg.get('default_scope')):
        if part.get('type') is None:
            continue
        library, dense = class_of(part['type'], scope)
        if not library and any(dense == name for _, name in twins()):
            library = _library_by_task(cfg)
        key = next(str(key) for key in reversed(path) if isinstance(key, str))
        if (library, dense) in twins() or key.endswith(_PLACES):
            found.append(Backbone(path, part, library, dense))
    return found


def plan_swap(cfg: Mapping[str, Any], settings: Settings) -> Changes:
    """Decide what becomes of every backbone that has an idle twin and is not a teacher.

    Raises:
        UsageError: No backbone can be converted, one cannot although its class has a twin, or a
            setting does not fit.
    """
    if not isinstance(cfg.get('model'), Mapping):
        raise UsageError('the config has no model')
    found = find_backbones(cfg)
    wanted = [backbone for backbone in found if backbone.twin and not backbone.is_teacher]
    if not wanted:
        idle = [backbone.name for backbone in found if backbone.dense in twins().values()]
        if idle:
            raise UsageError(f'{idle[0]} is idle already; set {idle[0]}.keep_ratios instead')
        kinds = '; '.join(f'{b.name} is {b.kind}' for b in found) or 'no backbone at all'
        known = ', '.join(f'{library}.{name}' for library, name in twins())
        raise UsageError(f'no backbone to convert; found: {kinds}; convertible: {known}')
    changes = Changes()
    _plan_hooks(cfg, settings, changes)
    for backbone in wanted:
        _plan_backbone(cfg, backbone, settings, changes)
    imports = cfg.get('custom_imports') or {}
    listed = imports.get('imports') or []
    if _is_list(listed) and listed:
        changes.adds['custom_imports.imports'] = [] if 'idlevit_mm' in listed else ['idlevit_mm']
    elif listed != 'idlevit_mm':
        changes.sets['custom_imports.imports'] = [*filter(None, [listed]), 'idlevit_mm']
    if 'allow_failed_imports' not in imports:
        changes.sets['custom_imports.allow_failed_imports'] = False
    if settings.load_from is not None:
        changes.sets['load_from'] = settings.load_from
        if cfg.get('resume'):
            changes.sets['resume'] = False
    return changes


def differences(before: Any, after: Any, key: str = '') -> Differences:
    """Old and new value of what differs, by dotted names; ``'(none)'`` for what one lacks."""
    if _is_list(before) and type(before) is type(after):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        same = before is after or (type(before) is type(after) and before == after)
        return {} if same else {key: (before, after)}
    found: Differences = {}
    for name in dict.fromkeys([*before, *after]):
        old, new = (values.get(name, '(none)') for values in (before, after))
        found |= differences(old, new, f'{key}.{name}' if key else str(name))
    return found


def idle_text(config: Path, out: Path, cfg: Config, changes: Changes) -> str:
    """Text of the config with idle backbones, for the file ``out``.

    It inherits ``config``; a config in mmengine's new style is written resolved.
    """
    lines = [f'# {config.name} with idle tokens, written by tools/idle_config.py']
    target, drops = Config(), [name.rpartition('.') for name in changes.drops]
    if Config._is_lazy_import(str(config)):
        target = Config(cfg.to_dict())
        for holder, _, key in drops:
            _at(target, holder).pop(key)
        for name, entries in changes.adds.items():
            _at(target, name).extend(entries)
    else:
        path = Path(os.path.relpath(config, out.parent)).as_posix()
        lines.append(f'_base_ = {path if path.startswith("../") else f"./{path}"!r}')
        lines += [f'_base_.{holder}.pop({key!r})' for holder, _, key in drops]
        lines += [f'_base_.{name}.extend({new!r})' for name, new in changes.adds.items() if new]
    target.merge_from_dict(changes.sets)
    try:
        return '\n'.join([*lines, target.pretty_text])
    except SyntaxError as error:
        raise UsageError(f'{config} cannot be written as text: {one_line(error, 300)}') from error


def idle_config(
    config: str, settings: Settings, out: str | None = None, force: bool = False
) -> Swapped:
    """Write the idle config of a user's config, as the options of ``tools/idle_config.py`` say.

    Raises:
        UsageError: Anything is missing, cannot be converted, or does not fit.
    """
    path = _config_path(config)
    target = _target(path, out, force)
    cfg = load_config(str(path))
    try:
        changes = plan_swap(cfg, settings)
    except UsageError as error:
        raise UsageError(f'{config}: {error}') from error
    text = idle_text(path, target, cfg, changes)

    # Beside the target, since what it inherits is named relative to its place.
    draft = target.with_name(f'{target.stem}_draft_{os.getpid()}.py')
    try:
        draft.write_text(text, encoding='utf-8')
        changed = differences(cfg.to_dict(), load_config(str(draft)).to_dict())
        if others := [name for name in changed if not changes.covers(name)]:
            raise UsageError(f'{config} cannot be inherited without changing {", ".join(others)}')
        os.replace(draft, target)
    except OSError as error:
        raise UsageError(f'--out {target} cannot be written: {error.strerror}') from error
    finally:
        draft.unlink(missing_ok=True)
    found = find_backbones(cfg)
    return Swapped(target, changed, tuple(b.name for b in found if b.twin and b.is_teacher))


def write_idle_config(
    config: str, settings: Settings, out: str | None = None, force: bool = False
) -> None:
    """Write the idle config of a user's config and print what it changes; see `idle_config`."""
    swapped = idle_config(config, settings, out, force)
    verb = 'resolves' if Config._is_lazy_import(str(_config_path(config))) else 'inherits'
    print(f'{os.path.relpath(swapped.file)} {verb} {config} and changes:')
    for key, (old, new) in swapped.changed.items():
        print(f'  {key}: {_short(old)} -> {_short(new)}')
    for name in swapped.left:
        print(f'Left dense, because others learn from it: {name}')


# Deciding


def _at(cfg: Any, name: str) -> Any:
    return functools.reduce(operator.getitem, name.split('.'), cfg)


def _library_by_task(cfg: Mapping[str, Any]) -> str:
    try:
        return _LIBRARIES[task_of(cfg)]  # type: ignore[arg-type]
    except UsageError:
        return ''


def _plan_backbone(
    cfg: Mapping[str, Any], backbone: Backbone, settings: Settings, changes: Changes
) -> None:
    kind, twin = f'{backbone.name} ({backbone.kind})', backbone.twin
    assert twin is not None
    if any(isinstance(key, int) for key in backbone.path):
        why = 'which a config that inherits can replace only as a whole'
        raise UsageError(f'{kind} stands in a list, {why}')
    try:
        models = importlib.import_module(f'{backbone.library}.models')
    except ImportError as error:
        why = f'is a class of {backbone.library}, which cannot be imported: {error}'
        raise UsageError(f'{backbone.name} {why}') from error
    dense_class, idle_class = getattr(models, backbone.dense), MODELS.get(twin)
    dense, idle = (
        {name: argument.default for name, argument in arguments_of(cls).items()}
        for cls in (dense_class, idle_class)
    )
    given = {k: value for k, value in backbone.config.items() if k not in ('type', '_scope_')}
    foreign = [name for name in given if name not in idle]
    different = (n for n in foreign if n not in dense or not _equal(given[n], dense[n]))
    if needed := [f'{name}={given[name]!r}' for name in different]:
        raise UsageError(f'{kind}: {twin} has no {", ".join(needed)}')
    if settings.load_from is None:
        _check_init_cfg(kind, twin, given.get('init_cfg'))

    updates = {
        name: list(default) if isinstance(default, tuple) else default
        for name, default in dense.items()
        if name in idle and name not in given and not _equal(default, idle[name])
    }
    updates['keep_ratios'] = settings.keep
    if settings.policy:
        updates['policy'] = dict(settings.policy)
    kept = {key: value for key, value in given.items() if key not in foreign}
    network = _built(f'{kind}: {twin}', idle_class, {**kept, **updates})
    _check_weights(kind, _built(kind, dense_class, given), network)
    if settings.random_ratios and all(r == 1.0 for stage in network.keep_ratios for r in stage):
        raise UsageError('--random-ratios leaves blocks with keep ratio 1.0 dense, and all have it')
    updates['type'] = twin
    holder = backbone.name.rpartition('.')[0]
    if settings.load_from is not None:
        updates |= {name: None for name in _WEIGHTS if given.get(name) is not None}
        # Segmentors hand theirs to the backbone.
        if _at(cfg, holder).get('pretrained') is not None:
            changes.sets[f'{holder}.pretrained'] = None
    changes.drops += [f'{backbone.name}.{name}' for name in foreign]
    changes.sets |= {f'{backbone.name}.{name}': value for name, value in updates.items()}


def _equal(first: Any, second: Any) -> bool:
    """Whether two settings are the same; lists and tuples are."""
    if _is_list(first) and _is_list(second):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(_equal(a, b) for a, b in pairs)
    return first == second


def _check_init_cfg(kind: str, twin: str, init_cfg: Any) -> None:
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


def _built(kind: str, cls: type[nn.Module], arguments: Mapping[str, Any]) -> Any:
    """Build a backbone without memory."""
    try:
        with _OnMeta():
            return cls(**{key: v for key, v in arguments.items() if key not in _WEIGHTS})
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise UsageError(f'{kind} does not build: {one_line(error)}') from error


def _check_weights(kind: str, dense: nn.Module, idle: nn.Module) -> None:
    """Check that the weights of both have the same names and shapes."""
    report = compare(idle.state_dict(), dense.state_dict(), policy_too=False)
    shapes = {name: tuple(w.shape) for m in (dense, idle) for name, w in m.state_dict().items()}
    differ: Differences = dict(report.mismatched)
    differ |= {name: (shapes[name], 'absent') for name in report.unexpected}
    differ |= {name: ('absent', shapes[name]) for name in report.missing}
    if differ:
        listed = [f'{name} is {a}, not {b}' for name, (a, b) in sorted(differ.items())]
        raise UsageError(
            f'{kind} has other weights than {type(idle).__name__}: {shortened(listed, 3, "; ")}'
        )


def _plan_hooks(cfg: Mapping[str, Any], settings: Settings, changes: Changes) -> None:
    hooks: list[dict[str, Any]] = []
    if settings.distill and settings.load_from is None:
        raise UsageError('--distill needs the checkpoint of its teacher: --load-from CHECKPOINT')
    if settings.random_ratios:
        try:
            RandomKeepRatioHook(*settings.random_ratios)
        except (TypeError, ValueError) as error:
            raise UsageError(f'--random-ratios: {error}') from error
        low, high = settings.random_ratios
        hooks.append(dict(type='RandomKeepRatioHook', low=low, high=high))
    if settings.distill:
        # Its teacher is by default what training starts from.
        hooks.append(dict(type='AuxiliaryLossHook', losses=[dict(type='FeatureDistillation')]))
    before = cfg.get('custom_hooks') or []
    present = {class_of(hook.get('type'))[1] for hook in before if isinstance(hook, Mapping)}
    for hook in hooks:
        if hook['type'] in present:
            raise UsageError(f'custom_hooks has a {hook["type"]} already, and one is all there is')
    if hooks and before:
        changes.adds['custom_hooks'] = hooks
    elif hooks:
        changes.sets['custom_hooks'] = hooks


# Writing


def _short(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _config_path(config: str) -> Path:
    """File of a config, which may be named as ``package::config``."""
    package, separator, name = config.partition('::')
    if not separator:
        return Path(config).absolute()
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f'config {config}: {package} is not installed')
    return Path(spec.submodule_search_locations[0], '.mim', 'configs', name)


def _target(config: Path, out: str | None, force: bool) -> Path:
    if out is None:
        installed = {'site-packages', 'dist-packages'} & set(config.parts)
        target = Path.cwd() if installed else config.parent
        target = target / f'{config.stem}_idle.py'
    else:
        target = Path(out).absolute()
    if target.suffix != '.py':
        raise UsageError(f'--out {out} must end in .py')
    if target.resolve() == config.resolve():
        raise UsageError(f'--out {out} is the config itself')
    if target.is_dir() or (target.exists() and not force):
        raise UsageError(f'{os.path.relpath(target)} exists already; --force replaces a file')
    if not target.parent.is_dir():
        raise UsageError(f'--out {out}: the folder {target.parent} does not exist')
    return target


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
