"""Keep the weights of a checkpoint and drop everything else, without running its code."""

import argparse

from idlevit_mm.checkpoints import strip_checkpoint
from idlevit_mm.engine.launch import run_tool


def strip(source: str, target: str) -> None:
    """Strip, and print what was dropped."""
    count, dropped = strip_checkpoint(source, target)
    print(f'{target}: {count} tensors; dropped: {", ".join(dropped) or "nothing"}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint of any origin; it need not be trusted')
    parser.add_argument('target', help='.pth or .safetensors file to write; it must not exist')
    run_tool(strip, **vars(parser.parse_args()))
