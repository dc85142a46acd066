"""Write a config of a user's config that has idle backbones in place of dense ones.

What ``tools/idle_config.py`` calls. Nothing is guessed: the dense backbone and its idle twin are
built without memory from the arguments of both configs and their weights compared, and what is
written is read again and compared with what was wanted.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..errors import UsageError, one_line
from ..hooks import RandomKeepRatioHook
from .checks import ABSENT, Differences, class_of, differences
from .dense import WEIGHTS, find_backbones, make_idle, twins
from .launch import load_config


@dataclass(frozen=True)
class Settings:
    """What a user wants of the idle config.

    Attributes:
        keep: Keep ratios of all backbones; see ``normalize_keep_ratios``.
        policy: Arguments of ``policy`` of the backbones; empty for the default.
        idle_where: Whether blocks idle always, or where it pays.
        load_from: Checkpoint of the dense model to start from, in place of ``init_cfg``.
        distill: Whether the model of ``load_from`` is the teacher of the features.
        random_ratios: Lowest and highest keep ratio of an iteration.
    """

    keep: Any
    policy: Mapping[str, Any] = field(default_factory=dict)
    idle_where: str = 'always'
    load_from: str | None = None
    distill: bool = False
    random_ratios: tuple[float, float] | None = None


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


def write_idle_config(
    config: str, settings: Settings, out: str | None = None, force: bool = False
) -> None:
    """Write the idle config of a user's config and print what it changes; see `idle_config`."""
    swapped = idle_config(config, settings, out, force)
    verb = 'resolves' if Config._is_lazy_import(str(_config_path(config))) else 'inherits'
    print(f'{os.path.relpath(swapped.file)} {verb} {config} and changes:')
    for key, pair in swapped.changed.items():
        old, new = (value if isinstance(value, str) else repr(value) for value in pair)
        print(f'  {key}: {old} -> {new}')
    for name in swapped.left:
        print(f'Left dense, because others learn from it: {name}')


def idle_config(
    config: str, settings: Settings, out: str | None = None, force: bool = False
) -> Swapped:
    """Write the idle config of a user's config, as the options of ``tools/idle_config.py`` say.

    Raises:
        UsageError: Anything is missing, cannot be converted, or does not fit.
    """
    path = _config_path(config)
    target = target_of(path, out, force)
    cfg = load_config(str(path))
    try:
        wanted = _made_idle(cfg.to_dict(), settings)
    except UsageError as error:
        raise UsageError(f'{config}: {error}') from error
    note = f'{path.name} with idle tokens, written by tools/idle_config.py'
    found = write_heir(path, target, cfg.to_dict(), wanted, note)
    left = tuple(b.name for b in find_backbones(wanted) if b.twin and b.is_teacher)
    return Swapped(target, differences(cfg.to_dict(), found), left)


def write_heir(
    config: Path, out: Path, before: dict[str, Any], wanted: dict[str, Any], note: str
) -> dict[str, Any]:
    """Write a config that inherits another one and changes it; returns it resolved.

    Args:
        config: The file that is inherited.
        out: The file to write.
        before: What the first one resolves to.
        wanted: What the second one is to resolve to.
        note: Its first line.

    Raises:
        UsageError: It cannot be written, or what is wanted cannot be inherited.
    """
    text = _text_of(config, out, before, wanted, note)
    # Beside the target, since what it inherits is named relative to its place.
    draft = out.with_name(f'{out.stem}_draft_{os.getpid()}.py')
    try:
        draft.write_text(text, encoding='utf-8')
        found = load_config(str(draft)).to_dict()
        if others := differences(wanted, found):
            raise UsageError(f'{config} cannot be inherited without changing {", ".join(others)}')
        os.replace(draft, out)
    except OSError as error:
        raise UsageError(f'--out {out} cannot be written: {error.strerror}') from error
    finally:
        draft.unlink(missing_ok=True)
    return found


# What is wanted


def _made_idle(wanted: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Change a resolved config: every backbone that has an idle twin, unless it is a teacher.

    Raises:
        UsageError: No backbone can be converted, one cannot although its class has a twin, or a
            setting does not fit.
    """
    if not isinstance(wanted.get('model'), Mapping):
        raise UsageError('the config has no model')
    found = find_backbones(wanted)
    dense = [backbone for backbone in found if backbone.twin and not backbone.is_teacher]
    if not dense:
        idle = [backbone.name for backbone in found if backbone.dense in twins().values()]
        if idle:
            raise UsageError(f'{idle[0]} is idle already; set {idle[0]}.keep_ratios instead')
        kinds = '; '.join(f'{b.name} is {b.kind}' for b in found) or 'no backbone at all'
        known = ', '.join(f'{library}.{name}' for library, name in twins())
        raise UsageError(f'no backbone to convert; found: {kinds}; convertible: {known}')
    _add_hooks(wanted, settings)
    for backbone in dense:
        if settings.load_from is not None:
            segmentor: Any = wanted
            for key in backbone.path[:-1]:
                segmentor = segmentor[key]
            # Segmentors hand theirs to the backbone.
            for place, names in ((backbone.config, WEIGHTS), (segmentor, ('pretrained',))):
                place.update({name: None for name in names if place.get(name) is not None})
        network = make_idle(backbone, settings.keep, settings.policy, settings.idle_where)
        ratios = [ratio for stage in network.keep_ratios for ratio in stage]
        if settings.random_ratios and set(ratios) == {1.0}:
            raise UsageError(
                '--random-ratios leaves blocks with keep ratio 1.0 dense, and all have it'
            )
    imports = wanted['custom_imports'] = wanted.get('custom_imports') or {}
    named = imports.get('imports') or []
    named = [named] if isinstance(named, str) else named
    if 'idlevit_mm' not in named:
        imports['imports'] = [*named, 'idlevit_mm']
    imports.setdefault('allow_failed_imports', False)
    if settings.load_from is not None:
        wanted['load_from'] = settings.load_from
        if wanted.get('resume'):
            wanted['resume'] = False
    return wanted


def _add_hooks(wanted: dict[str, Any], settings: Settings) -> None:
    hooks: list[dict[str, Any]] = []
    if settings.distill and settings.load_from is None:
        raise UsageError('--distill needs the checkpoint of its teacher: --load-from CHECKPOINT')
    if settings.random_ratios:
        low, high = settings.random_ratios
        try:
            RandomKeepRatioHook(low, high)
        except (TypeError, ValueError) as error:
            raise UsageError(f'--random-ratios: {error}') from error
        hooks.append(dict(type='RandomKeepRatioHook', low=low, high=high, sandwich=True))
    if settings.distill:
        # Its teacher is by default what training starts from.
        hooks.append(dict(type='AuxiliaryLossHook', losses=[dict(type='FeatureDistillation')]))
    before = wanted.get('custom_hooks') or []
    present = {class_of(hook.get('type'))[1] for hook in before if isinstance(hook, Mapping)}
    for hook in hooks:
        if hook['type'] in present:
            raise UsageError(f'custom_hooks has a {hook["type"]} already, and one is all there is')
    if hooks:
        wanted['custom_hooks'] = [*before, *hooks]


# Writing


def _config_path(config: str) -> Path:
    """File of a config, which may be named as ``package::config``."""
    package, separator, name = config.partition('::')
    if not separator:
        return Path(config).absolute()
    spec = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f'config {config}: {package} is not installed')
    return Path(spec.submodule_search_locations[0], '.mim', 'configs', name)


def target_of(config: Path, out: str | None, force: bool) -> Path:
    """The file to write, which must not be there yet."""
    installed = {'site-packages', 'dist-packages'} & set(config.parts)
    folder = Path.cwd() if installed else config.parent
    target = Path(out).absolute() if out else folder / f'{config.stem}_idle.py'
    if target.suffix != '.py':
        raise UsageError(f'--out {out} must end in .py')
    if target.resolve() == config.resolve():
        raise UsageError(f'--out {out} is the config itself')
    if target.is_dir() or (target.exists() and not force):
        raise UsageError(f'{os.path.relpath(target)} exists already; --force replaces a file')
    if not target.parent.is_dir():
        raise UsageError(f'--out {out}: the folder {target.parent} does not exist')
    return target


def _text_of(
    config: Path, out: Path, before: dict[str, Any], wanted: dict[str, Any], note: str
) -> str:
    """Text of what is wanted, for the file ``out``.

    It inherits ``config``; a config in mmengine's new style is written resolved.
    """
    lines = [f'# {note}']
    target = Config()
    if Config._is_lazy_import(str(config)):
        target = Config(wanted)
    else:
        path = Path(os.path.relpath(config, out.parent)).as_posix()
        lines.append(f'_base_ = {path if path.startswith("../") else f"./{path}"!r}')
        added: dict[str, list[Any]] = {}
        for name, (_, new) in differences(before, wanted).items():
            holder, _, key = name.rpartition('.')
            if new == ABSENT:
                lines.append(f'_base_.{holder}.pop({key!r})')
            elif key.isdigit():
                added.setdefault(holder, []).append(new)
            else:
                target.merge_from_dict({name: new})
        lines += [f'_base_.{name}.extend({entries!r})' for name, entries in added.items()]
    try:
        return '\n'.join([*lines, target.pretty_text])
    except SyntaxError as error:
        raise UsageError(f'{config} cannot be written as text: {one_line(error, 300)}') from error
