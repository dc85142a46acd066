"""Tries every config that ships with mmdet and mmseg: the tables of docs/config_swap.md, by hand.

python tests/sweep_of_swaps.py
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from mmengine.config import Config

from idlevit_mm.engine.swap import Settings, find_backbones, idle_config
from idlevit_mm.errors import UsageError

# Backbones without idle twin that one may look for in the table; those of convolutions are not.
OTHERS = ('BEiT', 'MAE', 'VPD', 'TIMMBackbone', 'PoolFormer')


def shipped_configs(package: str) -> Iterator[tuple[str, Path]]:
    """Name and file of the configs of an installed package, those in pure Python included."""
    spec = importlib.util.find_spec(package)
    for root in (spec and spec.submodule_search_locations) or ():
        for folder in (Path(root, '.mim', 'configs'), Path(root, 'configs')):
            for path in sorted(folder.rglob('*.py')):
                if '_base_' not in path.parts and path.name != '__init__.py':
                    yield path.relative_to(folder).as_posix(), path


def try_config(path: Path, folder: Path) -> tuple[str, str] | None:
    """Convert a config: its dense class and why it was refused; None without a transformer."""
    try:
        # Of what configs import, some is not installed here, and is not needed to look at them.
        found = find_backbones(Config.fromfile(path, import_custom_modules=False))
    except Exception:
        return '(unknown)', 'does not load'
    twins = sorted({backbone.dense for backbone in found if backbone.twin})
    if not twins:
        others = [backbone.dense for backbone in found if backbone.dense in OTHERS]
        return (others[0], 'no idle twin') if others else None
    try:
        idle_config(str(path), Settings(keep=0.7), str(folder / 'idle.py'), force=True)
    except UsageError as error:
        return twins[0], str(error).removeprefix(f'{path}: ')
    return twins[0], ''


def print_sweep() -> None:
    """Print counts by class and reasons of refusal, for all configs of mmdet and mmseg."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for package in ('mmdet', 'mmseg'):
            for name, path in shipped_configs(package):
                if outcome := try_config(path, Path(folder)):
                    rows.append((package, name.partition('/')[0], *outcome))
    table = pd.DataFrame(rows, columns=['package', 'folder', 'backbone', 'reason'])
    table['refused'] = table['reason'] != ''
    groups = table.groupby(['package', 'backbone'])['refused']
    counts = groups.agg(configs='size', refused='sum').reset_index()
    counts.insert(3, 'converted', counts['configs'] - counts['refused'])
    print(counts.to_markdown(index=False))
    reasons = table[table['refused']].drop(columns='refused').value_counts(sort=False)
    print('', reasons.reset_index(name='configs').to_markdown(index=False), sep='\n')


if __name__ == '__main__':
    print_sweep()
