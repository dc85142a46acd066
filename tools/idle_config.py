"""Write a small config that inherits yours and has idle backbones in place of dense ones."""

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from idlevit_mm.engine.launch import run_tool
from idlevit_mm.engine.swap import (
    Settings,
    find_backbones,
    idle_config,
    parse_keep,
    write_idle_config,
)
from idlevit_mm.errors import UsageError

# Backbones without idle twin that one may look for in the table; those of convolutions are not.
OTHERS = ('BEiT', 'MAE', 'PCPVT', 'SVT', 'VPD', 'TIMMBackbone', 'PoolFormer')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    shipped = 'config file, or one that ships with mmdet or mmseg: mmdet::swin/NAME.py'
    add('config', nargs='?', help=shipped)
    ratios = 'keep ratio in (0, 1]: one for all blocks, one per stage, or lists in quotes'
    add('--keep', nargs='+', metavar='RATIO', help=ratios)
    add('--out', help='file to write (default: <config>_idle.py beside the config)')
    add('--force', action='store_true', help='replace a file that exists')
    add('--policy', help='idling policy, such as IdleViT or SparseViT')
    add('--scorer', help='token scorer, such as mean_distance')
    add('--scope', help='map, window_tokens or windows')
    start = 'trained dense model to start from; replaces the weights of init_cfg'
    add('--load-from', metavar='CHECKPOINT', help=start)
    distill = 'learn the features of the dense model of --load-from as well'
    add('--distill', action='store_true', help=distill)
    draw = 'draw the keep ratio of each iteration anew; --keep is for validation'
    add('--random-ratios', nargs=2, type=float, metavar=('LOW', 'HIGH'), help=draw)
    sweep = 'try every config that ships with mmdet and mmseg, and print what can be converted'
    add('--all-installed', action='store_true', help=sweep)
    args = parser.parse_args()
    if args.all_installed == (args.config is not None):
        parser.error('name a config, or --all-installed')
    if args.config is not None and args.keep is None:
        parser.error('--keep is missing')
    return args


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
    import pandas as pd

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


def write(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if args.all_installed:
        print_sweep()
        return
    policy = {'type': args.policy, 'scorer': args.scorer, 'scope': args.scope}
    settings = Settings(
        keep=parse_keep(args.keep),
        policy={key: value for key, value in policy.items() if value is not None},
        load_from=args.load_from,
        distill=args.distill,
        random_ratios=args.random_ratios and tuple(args.random_ratios),
    )
    write_idle_config(args.config, settings, args.out, args.force)


if __name__ == '__main__':
    run_tool(write, args=parse_args())
