"""Test a detector, a segmentor or a classifier."""

import argparse

from idlevit_mm.engine.launch import evaluate_from_config, run_config_tool


def main() -> None:
    """Test."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='config file')
    add('checkpoint', help='checkpoint file')
    folder_help = 'folder for metrics and logs (default: work_dirs/<name of the config>)'
    add('--work-dir', help=folder_help)
    out_help = (
        'where to write predictions: a .pkl file; for segmentation also a folder for PNGs of '
        'class labels'
    )
    add('--out', help=out_help)
    add('--show-dir', help='folder for one painted picture per image')
    tta_help = "test time augmentation: the config's tta_model and tta_pipeline, else flips"
    add('--tta', action='store_true', help=tta_help)
    run_config_tool(evaluate_from_config, parser)


if __name__ == '__main__':
    main()
