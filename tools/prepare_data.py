"""Check a folder of COCO 2017 or ADE20K, and link or convert it into the layout of the configs.

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


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('dataset', choices=DATASETS, help='data set that the folder should be')
    parser.add_argument(
        '--root', type=Path, help='folder (default: where the configs look, data/coco or data/ade)'
    )
    parser.add_argument(
        '--link',
        type=Path,
        nargs='?',
        const=True,
        metavar='FOLDER',
        help='make FOLDER (default: where the configs look) of links to what is in --root, then '
        'check it',
    )
    parser.add_argument(
        '--convert',
        action='store_true',
        help='also unpack archives, use parts that lie elsewhere below --root, and write masks '
        'with equal colour channels as one channel; in --root itself without --link',
    )
    parser.add_argument(
        '--deep', action='store_true', help='decode every image and mask, not 200 of each split'
    )
    parser.add_argument('--plain', action='store_true', help='plain text, without colours')
    return parser.parse_args()


def prepare(
    dataset: str,
    root: Path | None,
    link: Path | bool | None,
    convert: bool,
    deep: bool,
    plain: bool,
) -> None:
    """Link or convert if asked to, check, print the report, and leave with its exit code."""
    expected = Path(PLACES[dataset])
    root = root or expected
    if (link or convert) and root.is_dir():
        target = expected if link is True else link or root
        assert isinstance(target, Path)
        for line in bring_into_place(dataset, root, target, convert):
            print(line)
        root = target
    sys.exit(print_report(check_data(dataset, root, deep), plain))


def main() -> None:
    """Prepare the data set that the command line names."""
    run_tool(prepare, **vars(parse_args()))


if __name__ == '__main__':
    main()
