"""Reading checkpoints without running code that they carry.

A checkpoint is a pickle, and a pickle may call any function of any module. torch's own safe reader
refuses that, and with it the checkpoints of mmengine 0.10, whose log histories are numpy arrays in
a class of its own; what it lets through may still be a program, or ask for any amount of memory.
Checkpoints are therefore read by :mod:`.archive` and :mod:`.unpickling`, never by ``torch.load``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import (
    BrokenCheckpointError,
    MissingFileError,
    UnsafeCheckpointError,
    UsageError,
    one_line,
    shortened,
)
from .archive import budget_of, open_archive
from .unpickling import ForeignContentsError, Unpickler

SAFETENSORS = '.safetensors'


def load_checkpoint(
    path: str | os.PathLike, map_location: Any = 'cpu', verify: bool = False
) -> dict[str, Any]:
    """Read a checkpoint, or a bare state dict, of this machine: tensors and mmengine's records.

    Args:
        path: Path of the file.
        map_location: As in :func:`torch.load`.
        verify: Whether to hold its bytes against their checksums, which reads all of it.

    Raises:
        MissingFileError: If there is no such file.
        UnsafeCheckpointError: If the file holds any other class or function.
        BrokenCheckpointError: If it is no checkpoint, or an incomplete one.
    """
    path = _file(path)
    if path.suffix == SAFETENSORS:
        loader = safetensors_torch()
        try:
            return loader.load_file(path, device=str(map_location))
        except Exception as error:
            raise reading_error(path, error) from error
    # Mapped, not read: most callers look at names and shapes only.
    checkpoint = read(path, map_location, mapped=True, verify=verify)
    if not isinstance(checkpoint, dict):
        raise BrokenCheckpointError(
            f'checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary of tensors'
        )
    return checkpoint


def read(
    source: str | os.PathLike | BinaryIO,
    map_location: Any = None,
    mapped: bool = False,
    foreign_too: bool = False,
    verify: bool = False,
) -> Any:
    """Read what ``torch.save`` wrote, in place of ``torch.load``.

    Args:
        source: Path or open file.
        map_location: As in :func:`torch.load`.
        mapped: Whether a file is mapped into memory rather than read.
        foreign_too: Whether it may hold other classes and functions, which are passed over.
        verify: Whether its bytes are held against their checksums.

    Raises:
        UnsafeCheckpointError: If it holds them, or is a program, or declares sizes that its bytes
            do not have.
        BrokenCheckpointError: If it is of another kind, or damaged.
    """
    path = _file(source) if isinstance(source, (str, os.PathLike)) else None
    name = path or 'that was fetched'
    placed = torch.serialization._get_restore_location(map_location)
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(path.open('rb')) if path else source
            archive = open_archive(file, verify)
            whole = None
            if mapped and path:
                whole = torch.UntypedStorage.from_file(str(path), False, archive.size)
            storages: dict[str, torch.UntypedStorage] = {}

            def storage(key: str, location: str, _: int) -> torch.UntypedStorage:
                if key not in storages:
                    storages[key] = placed(archive.storage(key, whole), location)
                return storages[key]

            trusted = {} if foreign_too else _trusted_by_the_user()
            unpickler = Unpickler(
                io.BytesIO(archive.pickle), storage, budget_of(archive.size), trusted
            )
            checkpoint = unpickler.load()
        if unpickler.foreign and not foreign_too:
            raise _refusal(name, shortened(sorted(unpickler.foreign)), stripping_helps=True)
    except UsageError:
        raise
    except Exception as error:
        raise reading_error(name, error) from error
    return checkpoint


def _file(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        what = 'is a folder, not a file' if path.is_dir() else 'does not exist'
        raise MissingFileError(f'checkpoint {path} {what}')
    return path


def _trusted_by_the_user() -> dict[str, Any]:
    """What somebody added to torch's list of safe classes, by full names; torch < 2.4 has none."""
    return getattr(torch._weights_only_unpickler, '_get_user_allowed_globals', dict)()


def safetensors_torch() -> Any:
    """The module ``safetensors.torch``, which comes with timm, not with OpenMMLab."""
    try:
        return importlib.import_module('safetensors.torch')
    except ImportError as error:
        raise UsageError(
            f'{SAFETENSORS} files need safetensors, which cannot be imported: {error}'
        ) from error


def reading_error(source: Any, error: Exception) -> UsageError:
    """What the error of a reader (ours, torch's, that of safetensors) means: unsafe or damaged."""
    if isinstance(error, ForeignContentsError):
        return _refusal(source, str(error), stripping_helps=False)
    reason = without_advice(error)
    if reason.startswith('GLOBAL '):
        return _refusal(source, reason, stripping_helps=True)
    return BrokenCheckpointError(
        f'checkpoint {source} cannot be read ({reason}): the file is incomplete, '
        'damaged, or no checkpoint'
    )


def without_advice(error: Exception) -> str:
    """An error in one line, less torch's advice to read the file all the same."""
    names = re.findall(r'GLOBAL (\S+(?:\(.*?\))?)', str(error))
    if names and isinstance(error, pickle.UnpicklingError):
        return f'GLOBAL {shortened(sorted(set(names)))}'
    if 'weights_only' in str(error):
        return 'it is refused by the safe reader of torch'
    return one_line(error, 200)


def _refusal(source: Any, what: str, stripping_helps: bool) -> UnsafeCheckpointError:
    remedy = (
        'To use the weights, drop everything else first: python '
        f'tools/model_converters/strip_checkpoint.py {source} stripped.pth'
        if stripping_helps
        else 'Ask for a file of the weights alone, as torch.save writes a state dict'
    )
    return UnsafeCheckpointError(
        f'checkpoint {source} is refused as unsafe: it holds {what}, and reading such things can '
        f'run code or fill the memory. Only tensors and the records of mmengine are read. {remedy}'
    )
