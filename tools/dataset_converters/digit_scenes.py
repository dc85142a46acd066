"""Write the digit-scenes data set in COCO's and ADE20K's layout."""

from __future__ import annotations

import argparse
from typing import Any

from idlevit_mm.datasets.digit_scenes import LAYOUTS, write_digit_scenes


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line; the parser comes along for reporting bad values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    pair: dict[str, Any] = dict(nargs=2, type=int, metavar=('MIN', 'MAX'))
    add('out_dir', help='folder to write, for example data/digit_scenes')
    add('--layout', nargs='+', choices=LAYOUTS, default=list(LAYOUTS), help='layouts to write')
    size_help = 'image side, or height and width'
    add('--size', nargs='+', type=int, default=[128], metavar='PIXELS', help=size_help)
    add('--num-train', type=int, default=2000, help='number of training images')
    add('--num-val', type=int, default=400, help='number of validation images')
    add('--seed', type=int, default=0, help='seed')
    add('--num-digits', **pair, default=[1, 5], help='number of digits in an image')
    add('--digit-scale', **pair, default=[20, 56], help='height of a digit in pixels')
    return parser, parser.parse_args()


def main() -> None:
    """Write the data set that the command line asks for."""
    parser, args = parse_args()
    if len(args.size) > 2:
        parser.error(f'--size takes one or two numbers, got {args.size}')
    try:
        written = write_digit_scenes(
            args.out_dir,
            layouts=args.layout,
            size=args.size if len(args.size) == 2 else args.size * 2,
            num_train=args.num_train,
            num_val=args.num_val,
            seed=args.seed,
            num_digits=args.num_digits,
            digit_scale=args.digit_scale,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    done = 'wrote' if written else 'already there:'
    print(f'{done} {args.num_train + args.num_val} digit scenes in {args.out_dir}')


if __name__ == '__main__':
    main()
