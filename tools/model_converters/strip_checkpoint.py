"""Keep the weights of a checkpoint and drop everything else, without running its code."""

import argparse
import sys

from idlevit_mm.checkpoints import strip_checkpoint
from idlevit_mm.errors import UsageError


def main() -> None:
    """Read the two paths and strip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint of any origin; it need not be trusted')
    parser.add_argument('target', help='file to write; it must not exist')
    args = parser.parse_args()
    try:
        count, dropped = strip_checkpoint(args.source, args.target)
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    print(f'{args.target}: {count} tensors; dropped: {", ".join(dropped) or "nothing"}')


if __name__ == '__main__':
    main()
