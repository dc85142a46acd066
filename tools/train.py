"""Train a detector, a segmentor or a classifier from a config file."""

import argparse

from idlevit_mm.engine.launch import run_config_tool, train_from_config


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='config file')
    folder_help = 'folder for checkpoints and logs (default: work_dirs/<name of the config>)'
    add('--work-dir', help=folder_help)
    resume_help = (
        'go on from this checkpoint; without a value, from the newest whole one in the work dir, '
        'or from the beginning if there is none'
    )
    add('--resume', nargs='?', const='auto', metavar='CHECKPOINT', help=resume_help)
    add('--amp', action='store_true', help='train in mixed precision')
    scale_help = 'scale the learning rate from auto_scale_lr.base_batch_size to the real batch size'
    add('--auto-scale-lr', action='store_true', help=scale_help)
    run_config_tool(train_from_config, parser)


if __name__ == '__main__':
    main()
