"""Print the config in a checkpoint, as text to be looked at; the checkpoint need not be trusted.

A text that has been looked at can be used: python tools/model_converters/print_config.py
CHECKPOINT > config.py
"""

import argparse

from idlevit_mm.checkpoints import config_text
from idlevit_mm.engine.launch import run_tool


def print_config(checkpoint: str) -> None:
    """Print the text."""
    print(config_text(checkpoint))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint of any origin')
    run_tool(print_config, **vars(parser.parse_args()))
