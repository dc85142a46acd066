"""Start the repository's own training and testing tools and read what they leave behind.

The demo and the studies run ``tools/train.py`` and ``tools/test.py`` as any user would, in
processes of their own, so that what they show is what the tools do.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

_PROGRESS = re.compile(
    r'(?:Epoch\(train\)\s+\[(?P<epoch>\d+)\]|Iter\(train\)\s+)\[\s*(?P<step>\d+)/\s*(?P<steps>\d+)\]'
    r'.*?eta: (?P<eta>.*?)\s\s.*?\bloss: (?P<loss>[\d.naif]+)'
)

_PR_SET_PDEATHSIG = 1
# Loaded here because little is safe between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
_active: set[subprocess.Popen] = set()


class RunFailed(RuntimeError):
    """A tool ended with an error; the message holds the end of its log."""


@dataclass(frozen=True)
class Progress:
    """One progress line of a training run.

    Attributes:
        epoch: counted from 1; None for a run counted in iterations.
        step: iteration, within the epoch if there are epochs.
        steps: iterations of the epoch or of the run.
        loss: the training loss.
        eta: remaining time as the trainer prints it.
    """

    epoch: int | None
    step: int
    steps: int
    loss: float
    eta: str

    @classmethod
    def of(cls, line: str) -> Progress | None:
        """Read a line of mmengine's log; None if it tells no training progress."""
        match = _PROGRESS.search(line)
        if match is None:
            return None
        epoch = match['epoch']
        return cls(
            int(epoch) if epoch else None,
            int(match['step']),
            int(match['steps']),
            float(match['loss']),
            match['eta'],
        )


def option_list(options: Mapping[str, Any]) -> list[str]:
    """Format overrides as ``--cfg-options`` takes them."""
    if not options:
        return []
    return ['--cfg-options', *(f'{key}={_formatted(value)}' for key, value in options.items())]


def _formatted(value: Any) -> str:
    """Numbers and text as they are, lists in brackets without blanks."""
    if isinstance(value, (list, tuple)):
        return '[' + ','.join(_formatted(item) for item in value) + ']'
    return str(value)


def run_tool(
    arguments: Sequence[str | Path],
    log: Path,
    *,
    threads: int | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a tool of the repository in a process of its own and keep its output in a file.

    Args:
        arguments: the tool's path within the repository and its arguments.
        log: file for everything the tool prints.
        threads: computing threads it may use; its own choice when None.
        on_line: called with every line as it comes.

    Raises:
        RunFailed: the tool ended with another status than 0.
    """
    environment = dict(os.environ, PYTHONUNBUFFERED='1')
    if threads is not None:
        environment['OMP_NUM_THREADS'] = environment['MKL_NUM_THREADS'] = str(threads)
    command = [sys.executable, *(str(argument) for argument in arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=25)
    with log.open('w') as file:
        file.write('$ ' + ' '.join(command) + '\n')
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        _active.add(process)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line.rstrip())
                if on_line is not None:
                    on_line(line)
            status = process.wait()
        except BaseException:
            stop(process)
            raise
        finally:
            _active.discard(process)
    if status != 0:
        raise RunFailed(
            f'{Path(command[1]).name} ended with status {status}; its last lines:\n  '
            + '\n  '.join(tail)
            + f'\nThe whole log: {log}'
        )


def _die_with_parent() -> None:
    """Ask Linux to end a tool when the process that reads its output is killed.

    Otherwise it would go on unseen, in the folder in which the next start works.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen) -> None:
    """End a tool and the data loading processes it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stop_all() -> None:
    """End all tools that were started from any thread of this process."""
    for process in list(_active):
        stop(process)


def stop_on_termination() -> None:
    """Turn a termination signal into an exit that ends the started tools as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def latest_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that a run in this folder wrote last; None if there is none."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        return None
    path = Path(pointer.read_text().strip())
    if not path.is_absolute():
        path = REPOSITORY / path
    # A folder that was moved still holds the file under its name.
    for candidate in (path, work_dir / path.name):
        if candidate.is_file():
            return candidate
    return None


def last_metrics(work_dir: Path, ignore: Collection[str] = ()) -> dict[str, float]:
    """The metrics of the newest evaluation in a run's JSON logs.

    Args:
        work_dir: the run's folder.
        ignore: names of folders in it, such as those of earlier runs, that are passed over.

    Returns:
        ``{metric: value}`` without the timing entries; empty if nothing was evaluated.
    """
    metrics: dict[str, float] = {}
    # Folders are named by the time of their start: later ones overwrite.
    logs = [*work_dir.glob('*/vis_data/scalars.json'), *work_dir.glob('*/*.json')]
    for path in sorted(logs, key=lambda log: log.relative_to(work_dir).parts[0]):
        if path.relative_to(work_dir).parts[0] in ignore:
            continue
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a run that was killed may leave half a line
            if isinstance(entry, dict) and ('coco/bbox_mAP' in entry or 'mIoU' in entry):
                metrics = {
                    key: value
                    for key, value in entry.items()
                    if isinstance(value, (int, float)) and key not in ('step', 'time', 'data_time')
                }
    return metrics


def data_root_options(cfg: Mapping[str, Any], old: str, new: str | Path) -> dict[str, str]:
    """Overrides that move every path of a config from one data folder to another.

    Args:
        cfg: the read config.
        old: the folder that the config names.
        new: the folder to use.

    Returns:
        ``{dotted key: new path}`` for all strings below the dataloaders and evaluators that
        start with the old folder.
    """
    old = old.rstrip('/')
    found: dict[str, str] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, str):
            if node == old or node.startswith(old + '/'):
                found[key] = str(new).rstrip('/') + node[len(old) :]
        elif isinstance(node, Mapping):
            for name, child in node.items():
                visit(child, f'{key}.{name}')
        elif isinstance(node, (list, tuple)):
            for index, child in enumerate(node):
                visit(child, f'{key}.{index}')

    for name, value in cfg.items():
        if name.endswith(('_dataloader', '_evaluator')) and value is not None:
            visit(value, name)
    return found


def shown(path: Path) -> str:
    """A path as seen from the repository; as it is, if it lies elsewhere."""
    path = path.resolve()
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def machine() -> str:
    """Processor, number of cores and memory, for the record of a measurement."""
    model = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                model = line.split(':', 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{model}, {cores} cores'


def versions() -> str:
    """Versions of Python and the libraries that a measurement depends on."""
    from ..engine.doctor import PROVIDERS, installed

    names = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm', 'numpy')
    packages = installed(package for name in names for package in PROVIDERS[name])
    found = [f'Python {platform.python_version()}']
    found += [f'{package} {version}' for package, version in packages.items()]
    return ', '.join(found)
