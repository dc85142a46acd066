"""Test a detector or a segmentor."""

import argparse
import os

from mmengine.config import DictAction
from torch.distributed.elastic.multiprocessing.errors import record

from idlevit_mm.engine.launch import evaluate_from_config, run_tool


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir', help='folder for metrics and logs (default: work_dirs/<name of the config>)'
    )
    parser.add_argument(
        '--out',
        help='where to write predictions; detection: a .pkl file; segmentation: a folder for '
        'PNGs of class labels, or a .pkl file',
    )
    parser.add_argument('--show-dir', help='folder for one painted picture per image')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test time augmentation: the config's tta_model and tta_pipeline, else flips",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config, e.g. model.backbone.keep_ratios=0.5; lists as '
        'key="[a,b]", without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started this process; see tools/dist_test.sh',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


@record
def main() -> None:
    """Test."""
    args = vars(parse_args())
    os.environ.setdefault('LOCAL_RANK', str(args.pop('local_rank')))
    run_tool(evaluate_from_config, **args)


if __name__ == '__main__':
    main()
