"""Try the config swap on every config that ships with mmdet and mmseg."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from ..engine.swap import Settings, find_backbones, idle_config
from ..errors import UsageError

PACKAGES = ('mmdet', 'mmseg')
# Backbones without idle twin that one may look for in the table; those of convolutions are not.
_OTHERS = ('BEiT', 'MAE', 'PCPVT', 'SVT', 'VPD', 'TIMMBackbone', 'PoolFormer')


_UNREADABLE = '(unknown)'


@dataclass(frozen=True)
class Outcome:
    """What the swap made of one config.

    Attributes:
        package: Package that ships it.
        config: Its path in the package's configs.
        dense: Class of its backbone.
        reason: Why it cannot be converted; '' where it was.
    """

    package: str
    config: str
    dense: str
    reason: str = ''


def shipped_configs(package: str) -> Iterator[tuple[str, Path]]:
    """Name and file of the configs of an installed package, those in pure Python included."""
    spec = importlib.util.find_spec(package)
    for root in (spec and spec.submodule_search_locations) or ():
        for folder in (Path(root, '.mim', 'configs'), Path(root, 'configs')):
            for path in sorted(folder.rglob('*.py')):
                if '_base_' not in path.parts and path.name != '__init__.py':
                    yield path.relative_to(folder).as_posix(), path


def try_config(package: str, name: str, path: Path, folder: Path) -> Outcome | None:
    """Convert one config into a folder; None if it holds no transformer to speak of."""
    try:
        # Of what configs import, some is not installed here, and is not needed to look at them.
        found = find_backbones(Config.fromfile(path, import_custom_modules=False))
    except Exception:
        return Outcome(package, name, _UNREADABLE, 'does not load')
    twins = sorted({backbone.dense for backbone in found if backbone.twin})
    if not twins:
        others = [b.dense for b in found if b.dense in _OTHERS]
        return Outcome(package, name, others[0], 'no idle twin') if others else None
    try:
        idle_config(str(path), Settings(keep=0.7), str(folder / 'idle.py'), force=True)
    except UsageError as error:
        return Outcome(package, name, twins[0], str(error).removeprefix(f'{path}: '))
    return Outcome(package, name, twins[0])


def sweep(packages: Sequence[str] = PACKAGES) -> list[Outcome]:
    """Convert every config of the packages that has a transformer as backbone."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [
            try_config(package, name, path, Path(folder))
            for package in packages
            for name, path in shipped_configs(package)
        ]
    return [outcome for outcome in outcomes if outcome is not None]


def sweep_table(outcomes: Sequence[Outcome]) -> str:
    """Counts by class, and the configs that were refused with the reason, in markdown."""
    kinds = Counter((o.package, o.dense) for o in outcomes)
    converted = Counter((o.package, o.dense) for o in outcomes if not o.reason)
    lines = ['| package | backbone | configs | converted | refused |', '|---|---|---|---|---|']
    for (package, dense), count in sorted(kinds.items()):
        good = converted[package, dense]
        lines.append(f'| {package} | `{dense}` | {count} | {good} | {count - good} |')
    lines += ['', '| refused | configs | backbone | reason |', '|---|---|---|---|']
    groups = Counter(
        (f'{o.package}: {o.config.partition("/")[0]}', o.dense, o.reason)
        for o in outcomes
        if o.reason
    )
    lines += [
        f'| {folder} | {count} | `{dense}` | {reason} |'
        for (folder, dense, reason), count in groups.items()
    ]
    return '\n'.join(lines)


def print_sweep() -> None:
    """Run the sweep over mmdet and mmseg and print its table."""
    print(sweep_table(sweep()))
