"""Write a small config that inherits yours and has idle backbones in place of dense ones."""

import argparse

from idlevit_mm.blocks import IDLE_WHERE
from idlevit_mm.engine.launch import run_tool
from idlevit_mm.engine.swap import Settings, parse_keep, write_idle_config


def write() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    shipped = 'config file, or one that ships with mmdet, mmseg or mmpretrain: mmdet::swin/NAME.py'
    add('config', help=shipped)
    ratios = 'keep ratio in (0, 1]: one for all blocks, one per stage, or lists in quotes'
    add('--keep', nargs='+', required=True, metavar='RATIO', help=ratios)
    add('--out', help='file to write (default: <config>_idle.py beside the config)')
    add('--force', action='store_true', help='replace a file that exists')
    add('--policy', help='idling policy, such as IdleViT or SparseViT')
    add('--scorer', help='token scorer, such as mean_distance')
    add('--scope', help='map, window_tokens or windows')
    cells = 'side of the cells whose idle tokens have a summary each, for EvoViT'
    add('--summary-size', type=int, help=cells)
    where = 'pays: blocks that idling would not make faster run dense'
    add('--idle-where', choices=IDLE_WHERE, default='always', help=where)
    start = 'trained dense model to start from; replaces the weights of init_cfg'
    add('--load-from', metavar='CHECKPOINT', help=start)
    distill = 'learn the features of the dense model of --load-from as well'
    add('--distill', action='store_true', help=distill)
    draw = 'train for all ratios between (sandwich rule); --keep is for validation'
    add('--random-ratios', nargs=2, type=float, metavar=('LOW', 'HIGH'), help=draw)
    args = parser.parse_args()
    policy = {'type': args.policy, 'scorer': args.scorer, 'scope': args.scope}
    policy['summary_size'] = args.summary_size
    settings = Settings(
        keep=parse_keep(args.keep),
        idle_where=args.idle_where,
        policy={key: value for key, value in policy.items() if value is not None},
        load_from=args.load_from,
        distill=args.distill,
        random_ratios=args.random_ratios and tuple(args.random_ratios),
    )
    write_idle_config(args.config, settings, args.out, args.force)


if __name__ == '__main__':
    run_tool(write)
