"""Weights from anywhere, to a file: the one reader and the one writer.

A source is a file of this machine, an address that mmengine's ``CheckpointLoader`` knows
(``https://``, ``s3://``, ``openmmlab://``, ...), or ``timm://`` and the name of a timm model.
Importing the module teaches ``CheckpointLoader`` the last, and ``.safetensors`` files, so that
``load_from`` and other backbones can name them as well, and to read what it downloads safely.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlparse

import mmengine.runner.checkpoint
import torch
from mmengine.fileio import get
from mmengine.runner.checkpoint import CheckpointLoader

from ..errors import BrokenCheckpointError, UsageError, one_line
from .safe_load import (
    SAFETENSORS,
    load_checkpoint,
    read,
    reading_error,
    safetensors_torch,
    without_advice,
)
from .weights import StateDict, unwrapped, weights_of

TIMM = 'timm://'
_SAFELY = {'TORCH_FORCE_WEIGHTS_ONLY_LOAD': '1', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '0'}
SUFFIXES = ('.pth', '.pt', SAFETENSORS)


def is_local(path: Any) -> bool:
    """Whether a path names a file of this machine rather than an address or a model's name."""
    return isinstance(path, (str, os.PathLike)) and '://' not in str(path)


def read_checkpoint(source: str | os.PathLike, logger: Any = 'silent') -> dict[str, Any]:
    """Read a checkpoint, or a bare state dict, from anywhere; ``logger`` hears what is fetched.

    Raises:
        UsageError: It cannot be fetched, or as in ``load_checkpoint``.
    """
    if is_local(source):
        return load_checkpoint(source)
    with _fetching_safely(source):
        return CheckpointLoader.load_checkpoint(str(source), map_location='cpu', logger=logger)


def read_weights(source: str | os.PathLike, logger: Any = 'silent') -> StateDict:
    """Read the weights of a checkpoint from anywhere, by name; see ``read_checkpoint``.

    Raises:
        BrokenCheckpointError: There are no weights in it.
    """
    weights = unwrapped(weights_of(read_checkpoint(source, logger)))
    if not weights:
        raise BrokenCheckpointError(f'checkpoint {source} holds no weights')
    return weights


def check_target(target: str | os.PathLike) -> Path:
    """The path of a file that ``write_weights`` can write; a UsageError where that is not so."""
    path = Path(target)
    if path.suffix not in SUFFIXES:
        raise UsageError(f'target={path} must end in one of {", ".join(SUFFIXES)}')
    if path.exists():
        raise UsageError(f'{path} exists already; choose another name')
    return path


def write_weights(weights: StateDict, target: str | os.PathLike, place: str = '') -> None:
    """Write weights to a new file, whole or not at all; in ``.pth`` under the key ``place``.

    Raises:
        UsageError: The file is there already, its name ends otherwise, or it cannot be written.
    """
    path = check_target(target)
    # safetensors wants each tensor in one piece and memory of its own.
    own = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    unfinished = path.with_name(f'{path.name}.unfinished')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == SAFETENSORS:
            safetensors_torch().save_file(own, unfinished, metadata={'format': 'pt'})
        else:
            torch.save({place: own} if place else own, unfinished)
        unfinished.rename(path)
    except (OSError, RuntimeError) as error:
        # torch says RuntimeError of a folder that it cannot write to.
        raise UsageError(f'{path} cannot be written: {one_line(error)}') from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@CheckpointLoader.register_scheme(TIMM, force=True)
def load_from_timm(filename: str, map_location: Any = None) -> StateDict:
    """Weights of a pretrained model of timm, from its own cache or downloaded.

    Raises:
        UsageError: timm is not installed, has no such model or no weights of it, or cannot fetch
            them.
    """
    name = filename.removeprefix(TIMM)
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f'checkpoint {filename} needs timm, which cannot be imported: {error}'
        ) from error
    _check_timm_name(name, filename)
    try:
        # A model draws its first weights; those of the training must not depend on that.
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise UsageError(
            f'checkpoint {filename} cannot be fetched by timm ({type(error).__name__}: '
            f'{without_advice(error)}). Without network, download the file of that model elsewhere '
            'and name its path instead'
        ) from error
    return {key: value.to(map_location or 'cpu') for key, value in model.state_dict().items()}


@CheckpointLoader.register_scheme(
    [rf'https?://\S+\{SAFETENSORS}$', rf'\S.*\{SAFETENSORS}$'], force=True
)
def load_from_safetensors(filename: str, map_location: Any = None) -> StateDict:
    """Weights of a ``.safetensors`` file of this machine or at an address."""
    if is_local(filename):
        return load_checkpoint(filename, map_location or 'cpu')
    weights = safetensors_torch().load(get(filename))
    return {key: value.to(map_location or 'cpu') for key, value in weights.items()}


def _check_timm_name(name: str, filename: str) -> None:
    """Refuse names of models and of weights that timm does not know, naming similar ones."""
    import timm

    model, _, tag = name.partition('.')
    if not timm.is_model(model):
        what, known = 'no such model', timm.list_models()
    elif tag and name not in timm.list_pretrained(f'{model}.*'):
        what, known = 'no such weights', timm.list_pretrained(f'{model}.*')
    else:
        return
    begun = [one for one in known if one.startswith(name)]
    similar = (begun + difflib.get_close_matches(name, known, n=3, cutoff=0.3))[:3]
    hint = f'; similar: {", ".join(similar)}' if similar else ''
    raise UsageError(f'checkpoint {filename}: timm {timm.__version__} has {what}{hint}')


def _download(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
) -> Any:
    """Stand in for the function with which mmengine downloads, whoever asks it to.

    torch's own unpacks archives with a single member into its cache, and reads the rest by
    ``torch.load``; the file has its place in the cache here too.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / (file_name or Path(urlparse(url).path).name)
    with _fetching_safely(url):
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            begun = torch.hub.HASH_REGEX.search(path.name) if check_hash else None
            torch.hub.download_url_to_file(url, str(path), begun and begun.group(1), progress)
        return read(path, map_location)


@contextlib.contextmanager
def _fetching_safely(source: str | os.PathLike) -> Iterator[None]:
    """Make torch read safely where its caller forgets to ask, as loaders of others may."""
    try:
        with mock.patch.dict(os.environ, _SAFELY):
            yield
    except UsageError:
        raise
    except (pickle.UnpicklingError, EOFError) as error:
        raise reading_error(source, error) from error
    except Exception as error:  # of the network, a storage's client, or the list of models
        raise UsageError(
            f'checkpoint {source} cannot be fetched '
            f'({type(error).__name__}: {without_advice(error)})'
        ) from error


if hasattr(mmengine.runner.checkpoint, 'load_url'):
    mmengine.runner.checkpoint.load_url = _download
