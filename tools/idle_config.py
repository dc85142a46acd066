"""Write a small config that inherits yours and has idle backbones in place of dense ones."""

import argparse

from idlevit_mm.analysis.swap_sweep import print_sweep
from idlevit_mm.engine.launch import run_tool
from idlevit_mm.engine.swap import Settings, parse_keep, write_idle_config


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config',
        nargs='?',
        help='config file, or one that ships with mmdet or mmseg: mmdet::swin/NAME.py',
    )
    parser.add_argument(
        '--keep',
        nargs='+',
        metavar='RATIO',
        help='keep ratio in (0, 1]: one for all blocks, one per stage, or lists in quotes',
    )
    parser.add_argument('--out', help='file to write (default: <config>_idle.py beside the config)')
    parser.add_argument('--force', action='store_true', help='replace a file that exists')
    parser.add_argument('--policy', help='idling policy, such as IdleViT or SparseViT')
    parser.add_argument('--scorer', help='token scorer, such as mean_distance')
    parser.add_argument('--scope', help='map, window_tokens or windows')
    parser.add_argument(
        '--load-from',
        metavar='CHECKPOINT',
        help='trained dense model to start from; replaces the weights of init_cfg',
    )
    parser.add_argument(
        '--distill',
        action='store_true',
        help='learn the features of the dense model of --load-from as well',
    )
    parser.add_argument(
        '--random-ratios',
        nargs=2,
        type=float,
        metavar=('LOW', 'HIGH'),
        help='draw the keep ratio of each iteration anew; --keep is for validation',
    )
    parser.add_argument(
        '--all-installed',
        action='store_true',
        help='convert every config that ships with mmdet and mmseg into a scratch folder and print '
        'a table of what can be converted, in markdown',
    )
    args = parser.parse_args()
    if args.all_installed == (args.config is not None):
        parser.error('name a config, or --all-installed')
    if args.config is not None and args.keep is None:
        parser.error('--keep is missing')
    return args


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
