"""Train, test and measure a detector and a segmentor with idle backbones on digit scenes."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from idlevit_mm.analysis import runs
from idlevit_mm.analysis.demo import run_demo
from idlevit_mm.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', type=Path, default=runs.REPOSITORY / 'work_dirs' / 'demo')
    parser.add_argument('--data-root', type=Path, default=runs.REPOSITORY / 'data' / 'digit_scenes')
    parser.add_argument('--fresh', action='store_true', help='forget earlier runs of the demo')
    return parser.parse_args()


def main() -> int:
    """Run the demo; the status is 1 if a model is worse than it should be, 2 if a step failed."""
    args = parse_args()
    console = Console(highlight=False)
    runs.stop_on_termination()
    try:
        good = run_demo(args.work_dir.resolve(), args.data_root.resolve(), args.fresh, console)
    except (runs.RunFailed, UsageError, ValueError, OSError) as error:
        console.print(f'The demo failed: {error}', style='bold red', markup=False)
        return 2
    except KeyboardInterrupt:
        console.print('Interrupted; the same command goes on from here.')
        return 130
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
