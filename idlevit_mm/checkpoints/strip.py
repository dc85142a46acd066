"""What people may want of a checkpoint that nobody vouches for: its weights, and its config."""

from __future__ import annotations

import os

from ..errors import UsageError, shown
from .files import check_target, write_weights
from .safe_load import read
from .weights import PLACES, place_of_weights, weights_of


def strip_checkpoint(source: str | os.PathLike, target: str | os.PathLike) -> tuple[int, list[str]]:
    """Write the weights of a checkpoint of any origin, and nothing else, to a new file.

    Names of classes and functions in the source are never resolved, so none of its code can run.
    The target holds ``{'state_dict': {name: tensor}}``.

    Returns:
        Number of tensors written, and the keys beside the weights that were dropped.

    Raises:
        UsageError: If the source is missing, the target exists, or there are no tensors.
        UnsafeCheckpointError: If the source is a program, or declares sizes that it does not have.
        BrokenCheckpointError: If the source cannot be read.
    """
    check_target(target)
    checkpoint = read(source, 'cpu', mapped=True, foreign_too=True)
    place = place_of_weights(checkpoint) if isinstance(checkpoint, dict) else ''
    dropped = [shown(key) for key in checkpoint if key != place] if place else []
    tensors = weights_of(checkpoint)
    if not tensors:
        raise UsageError(f'checkpoint {source} holds no tensors under {", ".join(PLACES)}')
    write_weights(tensors, target, 'state_dict')
    return len(tensors), dropped


def config_text(source: str | os.PathLike) -> str:
    """The config that mmengine wrote into a checkpoint of any origin: text, which never runs.

    What is neither printable nor the end of a line is a question mark: a terminal could take it for
    an order, or show the line as another.

    Raises:
        UsageError: If the source is missing, cannot be read, or has no config.
    """
    found = read(source, 'cpu', mapped=True, foreign_too=True)
    for path in (('message_hub', 'runtime_info', 'cfg'), ('meta', 'cfg'), ('meta', 'config')):
        value = found
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            return ''.join(c if c.isprintable() or c in '\n\t' else '?' for c in value)
    raise UsageError(f'checkpoint {source} holds no config')
