"""What has to agree before a training starts: its place, its checkpoint and all its processes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mmengine.dist import all_gather_object

from ..checkpoints import config_as_data
from ..errors import UsageError, shortened
from .checks import differences

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = '.training.lock'
# A lock of another host counts as long as its file is touched; seconds.
_TOUCHED_EVERY, _FORGOTTEN_AFTER = 30, 300
# By process: those that are forked have the list too, but no lock.
_held: set[tuple[int, str]] = set()


@contextlib.contextmanager
def locked(work_dir: str | os.PathLike) -> Iterator[None]:
    """Keep other trainings out of a work dir; the lock ends with the process at the latest.

    Raises:
        UsageError: Another training is in it.
    """
    path = Path(work_dir, _LOCK).absolute()
    key = os.getpid(), str(path)
    if key in _held or fcntl is None:
        yield
        return
    with _taken(path):
        _held.add(key)
        done = threading.Event()
        threading.Thread(target=_touch, args=(path, done), daemon=True).start()
        try:
            yield
        finally:
            done.set()
            _held.discard(key)
            path.unlink(missing_ok=True)


def _taken(path: Path) -> IO[str]:
    file = open(path, 'a+')  # noqa: SIM115 (the lock ends where it is closed)
    _take(file, path)
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()  # the training that had it has just deleted it
    return _taken(path)


def _take(file: IO[str], path: Path) -> None:
    file.seek(0)
    host, _, process = file.read(300).partition(' ')
    own, age = socket.gethostname(), time.time() - os.fstat(file.fileno()).st_mtime
    try:
        # Unlike flock's, this lock is not inherited by data loading workers.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = False
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks
        taken = host == own and process != str(os.getpid()) and os.path.exists(f'/proc/{process}')
    # File systems may keep locks for themselves on each host.
    if taken or (host not in ('', own) and age < _FORGOTTEN_AFTER):
        raise UsageError(
            f'work dir {path.parent} has a training in it already, process {process} on {host}: '
            'end that one, or name another folder with --work-dir'
            + ('' if taken else f'. If it is gone, wait {_FORGOTTEN_AFTER} s or delete {path}')
        )
    file.truncate(0)
    file.write(f'{own} {os.getpid()}')
    file.flush()


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(_TOUCHED_EVERY):
        with contextlib.suppress(OSError):
            os.utime(path)


# Parts of a config that a resumed training may have otherwise, and what of it changes nothing.
_LEARNING = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'custom_hooks')
_HOW_FAST = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor')
# They are part of the state that is restored.
_RESTORED = ('optim_wrapper.optimizer.', 'optim_wrapper.paramwise_cfg', 'param_scheduler')


def other_settings(checkpoint: Mapping[str, Any], config: str) -> str | None:
    """In one line, which settings a resumed training has otherwise, and which of both count.

    Args:
        checkpoint: What is resumed from.
        config: Text of the config of the training that goes on.
    """
    text = checkpoint['meta'].get('cfg') or checkpoint['meta'].get('config')
    before, now = (_of_learning(config_as_data(text)) for text in (text, config))
    if not before:
        return None
    said = [
        f'{key} is {new}, was {old} '
        f'({"as in the checkpoint" if key.startswith(_RESTORED) else "as in the config"} from '
        'here on)'
        for key, (old, new) in differences(before, now).items()
    ]
    return f'Resuming with other settings: {shortened(said, 8, "; ")}.' if said else None


def _of_learning(config: dict[str, Any]) -> dict[str, Any]:
    found = {key: config[key] for key in _LEARNING if key in config}
    loader = config.get('train_dataloader')
    if isinstance(loader, dict):
        found['train_dataloader'] = {k: v for k, v in loader.items() if k not in _HOW_FAST}
    return found


# What processes may have for themselves.
_OWN = ('work_dir', 'log_level', 'visualizer', 'launcher')


def check_same_config(config: Mapping[str, Any]) -> None:
    """Check that all processes of a group have the same settings, paths aside.

    Raises:
        UsageError: They do not; the message names the first key that differs.
    """
    mine = {key: value for key, value in config.items() if key not in _OWN}
    every = all_gather_object(_as_text(mine))
    for number, other in enumerate(every):
        for key, (first, value) in differences(every[0], other).items():
            if not any(os.sep in str(each) for each in (first, value)):
                raise UsageError(
                    f'the processes have different configs: {key} is {first} in process 0 and '
                    f'{value} in process {number}. Start all of them with the same command and '
                    'the same files'
                )


def _as_text(value: Any) -> Any:
    """A config of which every value is text, the same for the same class in any process."""
    if isinstance(value, Mapping):
        return {str(key): _as_text(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_text(entry) for entry in value]
    return getattr(value, '__qualname__', None) or repr(value)
