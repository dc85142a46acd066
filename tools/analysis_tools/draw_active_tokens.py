"""Draw what a trained model saw, found and left idle: one picture per image."""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from idlevit_mm.analysis.models import load_model
from idlevit_mm.analysis.pictures import draw_dataset, draw_files
from idlevit_mm.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--out-dir', type=Path, required=True)
    parser.add_argument(
        '--images', nargs='+', help='image files (default: images of the test data set)'
    )
    parser.add_argument('--count', type=int, default=8, help='how many images of the data set')
    parser.add_argument('--indices', nargs='+', type=int, help='these images of the data set')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of a box')
    parser.add_argument(
        '--per', choices=['stage', 'block'], default='stage', help='one picture of tokens for each'
    )
    parser.add_argument(
        '--dense',
        nargs=2,
        metavar=('CONFIG', 'CHECKPOINT'),
        help='a model whose predictions are shown beside, such as the dense one',
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides')
    return parser.parse_args()


def main() -> int:
    """Draw and print the paths."""
    args = parse_args()
    try:
        models = {}
        if args.dense:
            dense, checkpoint = args.dense
            models['Dense'] = load_model(dense, checkpoint, args.device, args.cfg_options)
        model = load_model(args.config, args.checkpoint, args.device, args.cfg_options)
        models['Idle' if args.dense else 'Prediction'] = model
        options = {'score_threshold': args.score_thr, 'per': args.per}
        if args.images:
            paths = draw_files(models, args.images, args.out_dir, **options)
        else:
            paths = draw_dataset(models, args.out_dir, args.indices, args.count, **options)
    except (ValueError, TypeError, FileNotFoundError, UsageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
