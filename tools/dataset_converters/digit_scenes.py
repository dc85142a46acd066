"""Write the digit-scenes data set in COCO's and ADE20K's layout."""

import argparse
from typing import Any

from idlevit_mm.datasets.digit_scenes import write_digit_scenes
from idlevit_mm.datasets.scenes import LAYOUTS


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    pair: dict[str, Any] = dict(nargs=2, type=int, metavar=('MIN', 'MAX'))
    add('out_dir', help='folder to write, for example data/digit_scenes')
    layout_help = 'layouts to write'
    add('--layout', nargs='+', dest='layouts', choices=LAYOUTS, default=LAYOUTS, help=layout_help)
    size_help = 'image side, or height and width'
    add('--size', nargs='+', type=int, default=[128], metavar='PIXELS', help=size_help)
    add('--num-train', type=int, default=2000, help='number of training images')
    add('--num-val', type=int, default=400, help='number of validation images')
    add('--seed', type=int, default=0, help='seed')
    add('--num-digits', **pair, default=[1, 5], help='number of digits in an image')
    add('--digit-scale', **pair, default=[20, 56], help='height of a digit in pixels')
    args = parser.parse_args()
    if len(args.size) > 2:
        parser.error(f'--size takes one or two numbers, got {args.size}')
    args.size = [args.size[0], args.size[-1]]
    try:
        written = write_digit_scenes(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    done = 'wrote' if written else 'already there:'
    print(f'{done} {args.num_train + args.num_val} digit scenes in {args.out_dir}')


if __name__ == '__main__':
    main()
