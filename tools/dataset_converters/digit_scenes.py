"""Write the digit-scenes data set in COCO's and ADE20K's layout."""

from __future__ import annotations

import argparse

from idlevit_mm.datasets.digit_scenes import LAYOUTS, write_digit_scenes


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line; the parser comes along for reporting bad values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('out_dir', help='folder to write, for example data/digit_scenes')
    parser.add_argument(
        '--layout', nargs='+', choices=LAYOUTS, default=list(LAYOUTS), help='layouts to write'
    )
    parser.add_argument(
        '--size',
        nargs='+',
        type=int,
        default=[128],
        metavar='PIXELS',
        help='image side, or height and width',
    )
    parser.add_argument('--num-train', type=int, default=2000, help='number of training images')
    parser.add_argument('--num-val', type=int, default=400, help='number of validation images')
    parser.add_argument('--seed', type=int, default=0, help='seed')
    parser.add_argument(
        '--num-digits',
        nargs=2,
        type=int,
        default=[1, 5],
        metavar=('MIN', 'MAX'),
        help='number of digits in an image',
    )
    parser.add_argument(
        '--digit-scale',
        nargs=2,
        type=int,
        default=[20, 56],
        metavar=('MIN', 'MAX'),
        help='height of a digit in pixels',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace a digit-scenes set that was written with other parameters',
    )
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
            force=args.force,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    total = args.num_train + args.num_val
    done = 'wrote' if written else 'already there:'
    print(f'{done} {total} digit scenes in {args.out_dir}')


if __name__ == '__main__':
    main()
