"""What people may want of a checkpoint that nobody vouches for: its weights, and its config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingFileError, UsageError
from .safe_load import read
from .unpickling import shown
from .weights import PLACES, place_of_weights, weights_of


def strip_checkpoint(source: str | os.PathLike, target: str | os.PathLike) -> tuple[int, list[str]]:
    """Write the weights of a checkpoint, and nothing else, to a new file.

    Names of classes and functions in the source are never resolved, so none of its code can run;
    a file need not be trusted.

    Args:
        source: Checkpoint of any origin. The weights are looked for under ``state_dict``,
            ``model``, ``module`` or at the top.
        target: File to write: ``{'state_dict': {name: tensor}}``. It must not exist.

    Returns:
        Number of tensors written, and the keys beside the weights that were dropped.

    Raises:
        UsageError: If the source is missing, the target exists, or there are no tensors.
        UnsafeCheckpointError: If the source is a program, or declares sizes that it does not have.
        BrokenCheckpointError: If the source cannot be read.
    """
    target = Path(target)
    if target.exists():
        raise UsageError(f'{target} exists already; choose another name')
    checkpoint = _read(source)
    place = place_of_weights(checkpoint) if isinstance(checkpoint, dict) else ''
    dropped = [shown(key) for key in checkpoint if key != place] if place else []
    tensors = {key: value.detach().clone() for key, value in weights_of(checkpoint).items()}
    if not tensors:
        raise UsageError(f'checkpoint {source} holds no tensors under {", ".join(PLACES)}')
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'state_dict': tensors}, target)
    return len(tensors), dropped


def config_text(source: str | os.PathLike) -> str:
    """The config that mmengine wrote into a checkpoint, to be looked at: text, which never runs.

    Args:
        source: Checkpoint of any origin.

    Returns:
        The text. What is neither printable nor the end of a line is a question mark: a terminal
        could take it for an order, or show the line as another.

    Raises:
        UsageError: If the source is missing, cannot be read, or has no config.
    """
    found = _read(source)
    for path in (('message_hub', 'runtime_info', 'cfg'), ('meta', 'cfg'), ('meta', 'config')):
        value = found
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            return ''.join(c if c.isprintable() or c in '\n\t' else '?' for c in value)
    raise UsageError(f'checkpoint {source} holds no config')


def _read(source: str | os.PathLike) -> Any:
    if not Path(source).is_file():
        raise MissingFileError(f'checkpoint {source} does not exist')
    return read(source, 'cpu', mapped=True, foreign_too=True)
