"""Compare scorers and scopes by fine-tuning one dense checkpoint with each of them.

Finished runs are kept: after an interruption, the same command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from idlevit_mm.analysis import finetuning, runs, study
from idlevit_mm.errors import UsageError

CONFIGS = runs.REPOSITORY / 'configs' / 'digit_scenes'
DENSE = 'retinanet_idle-swin_dense_digits'
WORK_DIRS = runs.REPOSITORY / 'work_dirs'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--config',
        type=Path,
        default=CONFIGS / 'retinanet_idle-swin_finetune_digits.py',
        help='fine-tune config (default: RetinaNet with an idle Swin on digit scenes)',
    )
    parser.add_argument(
        '--checkpoint',
        type=Path,
        help='dense weights to start from (default: those of the dense twin, trained if missing)',
    )
    parser.add_argument('--out-dir', type=Path, default=WORK_DIRS / 'scorer_study')
    parser.add_argument('--scorers', nargs='+', default=list(study.SCORERS))
    parser.add_argument('--scopes', nargs='+', choices=study.SCOPES, default=list(study.SCOPES))
    parser.add_argument('--keep-ratios', nargs='+', type=float, default=[0.7, 0.5])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    parser.add_argument('--epochs', type=int, default=4, help='fine-tuning epochs of every run')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--threads', type=int, default=1, help='computing threads per run')
    parser.add_argument('--time-budget', type=float, help='minutes after which no run is started')
    parser.add_argument('--input-shape', nargs=2, type=int, default=[128, 128], metavar=('H', 'W'))
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='further overrides for every run'
    )
    return parser.parse_args()


def main() -> int:
    """Do the study; the status is 1 if runs are left."""
    args = parse_args()
    runs.stop_on_termination()
    try:
        checkpoint = args.checkpoint
        if checkpoint is None:
            checkpoint = finetuning.dense_checkpoint(CONFIGS / f'{DENSE}.py', WORK_DIRS / DENSE)
        text, complete = study.run_study(
            config=args.config.resolve(),
            checkpoint=checkpoint.resolve(),
            out_dir=args.out_dir.resolve(),
            scorers=args.scorers,
            scopes=args.scopes,
            keep_ratios=args.keep_ratios,
            seeds=args.seeds,
            epochs=args.epochs,
            jobs=args.jobs,
            threads=args.threads,
            time_budget=None if args.time_budget is None else 60 * args.time_budget,
            input_shape=args.input_shape,
            extra_options=args.cfg_options,
        )
    except (ValueError, FileNotFoundError, UsageError, runs.RunFailed) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print()
    print(text)
    print(f'written to {args.out_dir / "study.md"}')
    return 0 if complete else 1


if __name__ == '__main__':
    sys.exit(main())
