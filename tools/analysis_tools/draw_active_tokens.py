"""Draw what a trained model saw, found and left idle: one picture per image."""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from idlevit_mm.analysis.models import load_model
from idlevit_mm.analysis.pictures import draw_dataset, draw_files
from idlevit_mm.analysis.results import exit_code


@exit_code
def main() -> None:
    """Draw and print the paths."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', type=Path)
    add('checkpoint', type=Path)
    add('--out-dir', type=Path, required=True)
    add('--images', nargs='+', help='image files (default: images of the test data set)')
    add('--count', type=int, default=8, help='how many images of the data set')
    add('--indices', nargs='+', type=int, help='these images of the data set')
    add('--score-thr', type=float, default=0.3, help='lowest score of a box')
    per_help = 'one picture of tokens for each'
    add('--per', choices=['stage', 'block'], default='stage', help=per_help)
    dense_help = 'a model whose predictions are shown beside, such as the dense one'
    add('--dense', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help=dense_help)
    add('--device', default='cpu')
    add('--cfg-options', nargs='+', action=DictAction, help='overrides')
    args = parser.parse_args()
    sources = {'Idle' if args.dense else 'Prediction': (args.config, args.checkpoint)}
    if args.dense:
        sources = {'Dense': args.dense, **sources}
    models = {
        title: load_model(*source, args.device, args.cfg_options)
        for title, source in sources.items()
    }
    options = {'score_threshold': args.score_thr, 'per': args.per}
    if args.images:
        paths = draw_files(models, args.images, args.out_dir, **options)
    else:
        paths = draw_dataset(models, args.out_dir, args.indices, args.count, **options)
    print(*paths, sep='\n')


if __name__ == '__main__':
    sys.exit(main())
