"""Compare policies at equal multiply-adds by fine-tuning dense checkpoints with each of them.

Finished runs are kept: after an interruption, the same command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from idlevit_mm.analysis import finetuning, policy_report, policy_study, runs
from idlevit_mm.errors import UsageError

WORK_DIRS = runs.REPOSITORY / 'work_dirs'
TASKS = list(policy_study.TASKS)
METHODS = list(policy_study.METHODS)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=TASKS)
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=METHODS,
        default=METHODS,
        help='besides the dense one, which is always there',
    )
    parser.add_argument(
        '--levels',
        nargs='+',
        type=float,
        default=list(policy_study.LEVELS),
        help='shares of the dense multiply-adds to save',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    parser.add_argument('--epochs', type=int, default=2, help='fine-tuning epochs of every run')
    parser.add_argument(
        '--random-ratios',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='also fine-tune one checkpoint for many ratios (swin-det, first seed)',
    )
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--threads', type=int, default=1, help='computing threads per run')
    parser.add_argument('--time-budget', type=float, help='minutes after which no run is started')
    parser.add_argument('--out-dir', type=Path, default=WORK_DIRS / 'policy_study')
    parser.add_argument(
        '--dense-dir',
        type=Path,
        default=WORK_DIRS,
        help='folder with the dense runs, MODEL_dense_digits/epoch_6.pth; trained if missing',
    )
    parser.add_argument('--no-speed', action='store_true', help='do not time the backbones')
    parser.add_argument(
        '--speed-seconds', type=float, default=60.0, help='time for each task and image size'
    )
    parser.add_argument('--figure', type=Path, help='draw scores over multiply-adds into this file')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='further overrides for every run'
    )
    return parser.parse_args()


def main() -> int:
    """Do the study; the status is 1 if runs are left."""
    args = parse_args()
    runs.stop_on_termination()
    try:
        checkpoints = {}
        for name in args.tasks:
            task = policy_study.TASKS[name]
            folder = args.dense_dir.resolve() / task.dense_config.stem
            checkpoints[name] = finetuning.dense_checkpoint(
                task.dense_config, folder, args.cfg_options
            )
        outcome = policy_study.run_study(
            checkpoints=checkpoints,
            out_dir=args.out_dir.resolve(),
            methods=args.methods,
            levels=args.levels,
            seeds=args.seeds,
            epochs=args.epochs,
            random_ratios=args.random_ratios,
            jobs=args.jobs,
            threads=args.threads,
            time_budget=None if args.time_budget is None else 60 * args.time_budget,
            extra_options=args.cfg_options,
        )
        speeds = (
            {}
            if args.no_speed
            else policy_report.measure_speeds(outcome, max_seconds=args.speed_seconds)
        )
        text = policy_report.report_text(outcome, speeds, finetuning.command_line())
        args.out_dir.mkdir(parents=True, exist_ok=True)
        (args.out_dir / 'study.md').write_text(text)
        if args.figure is not None:
            policy_report.draw(outcome, args.figure)
    except (ValueError, TypeError, FileNotFoundError, UsageError, runs.RunFailed) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print()
    print(text)
    print(f'written to {args.out_dir / "study.md"}')
    return 0 if outcome.complete else 1


if __name__ == '__main__':
    sys.exit(main())
