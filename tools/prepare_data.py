"""Check a folder of COCO 2017 or ADE20K, and link it to where the configs look.

Says what is missing or malformed and what to do about it. Nothing is deleted or overwritten. Exit
code 0: fit for use (notes aside), 1: something is wrong, 2: it was called wrongly.
"""

import argparse
import sys
from pathlib import Path

from idlevit_mm.engine.data_checks import check_data
from idlevit_mm.engine.data_layout import DATASETS, PLACES, bring_into_place
from idlevit_mm.engine.doctor import print_report
from idlevit_mm.engine.launch import run_tool


def prepare() -> None:
    """Link if asked to, check, print the report, and leave with its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('dataset', choices=DATASETS, help='data set that the folder should be')
    places = 'default: where the configs look'
    add('--root', type=Path, help=f'folder ({places}, data/coco or data/ade)')
    link_help = f'make FOLDER ({places}) of links to what is in --root, then check it'
    add('--link', type=Path, nargs='?', const=True, metavar='FOLDER', help=link_help)
    deep_help = 'decode every image and mask, not 200 of each split'
    add('--deep', action='store_true', help=deep_help)
    args = parser.parse_args()
    expected = Path(PLACES[args.dataset])
    root = args.root or expected
    if args.link and root.is_dir():
        target = expected if args.link is True else args.link
        for line in bring_into_place(args.dataset, root, target):
            print(line)
        root = target
    sys.exit(print_report(check_data(args.dataset, root, args.deep)))


if __name__ == '__main__':
    run_tool(prepare)
