"""Sets up an environment of this checkout: `.venv` with pinned packages and compiled mmcv ops.

`make setup`, `make demo` and `make test` call it; it needs nothing but Python's standard library
and does nothing when nothing has changed. `--stack onedl` (`make setup-onedl`) makes `.venv-onedl`
instead, with the maintained forks that own the same import names. Whatever Python starts it, the
environment gets Python 3.10, 3.11 or 3.12. Steps that were finished stay finished: after a failure
or an interruption the same command goes on from there, in the middle of compiling mmcv too.

Environment variables:
    PYTHON: the interpreter to build the environment with (same as --python).
    IDLEVIT_MM_CACHE: where compiled mmcv wheels are kept, by default
        `${XDG_CACHE_HOME:-~/.cache}/idlevit_mm`.
    IDLEVIT_MM_OPS: `cpu` or `cuda` to choose the ops of mmcv; by default CUDA ops are built when
        torch sees a GPU and the CUDA toolkit fits.
    MAX_JOBS: compilers that may run at once; by default one per core, as memory allows.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 10), (3, 11), (3, 12))
CANDIDATES = ('python3.11', 'python3.12', 'python3.10', 'python3', 'python')
# Raise it when a change of this file must make existing environments set themselves up again.
RECIPE = 1
STATE_NAME = 'idlevit_mm-setup.json'
# A compiler works on one file of mmcv with up to this much memory.
BYTES_PER_JOB = 2 * 1024**3
# torch, its CUDA libraries and everything else take 6 GB once unpacked.
BYTES_NEEDED = 7 * 1024**3
TICK = 0.5

PROBE_PYTHON = """
import json, os, sys, sysconfig
try:
    import ensurepip, venv
    venv_ok = True
except ImportError:
    venv_ok = False
header = os.path.join(sysconfig.get_paths()['include'], 'Python.h')
print(json.dumps(dict(version=list(sys.version_info[:3]), executable=sys.executable,
                      venv=venv_ok, headers=os.path.isfile(header))))
"""

PROBE_TORCH = """
import json, torch
boxes, capabilities, home = torch.zeros(1, 4), [], None
if torch.cuda.is_available():
    from torch.utils.cpp_extension import CUDA_HOME as home
    capabilities = sorted({'%d%d' % torch.cuda.get_device_capability(i)
                           for i in range(torch.cuda.device_count())})
print(json.dumps(dict(torch=torch.__version__, cuda=torch.version.cuda, cuda_home=home,
                      capabilities=capabilities)))
"""

PROBE_TORCHVISION = """
import torch, torchvision
boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.]])
assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
"""

PROBE_MMCV = """
import sys, torch, mmcv
from mmcv.ops import nms
assert mmcv.__version__ == sys.argv[1], 'it is mmcv ' + mmcv.__version__
for device in sys.argv[2:]:
    boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.], [20., 20., 30., 30.]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    _, kept = nms(boxes.to(device), scores.to(device), 0.5)
    assert kept.tolist() == [0, 2], 'nms kept %s instead of [0, 2]' % kept.tolist()
"""

PROBE_IMPORTS = """
import importlib
import importlib.metadata
for name in ('torch', 'torchvision', 'mmengine', 'mmcv.ops', 'mmdet.apis', 'mmseg.apis', 'timm',
             'cv2', 'sklearn', 'pycocotools.mask', 'matplotlib', 'rich', 'pytest', 'hypothesis'):
    importlib.import_module(name)
importlib.metadata.version('idlevit_mm')
"""

# What to do about the failures that are known, looked up in the log of the step; first hit wins.
ADVICE = (
    (r'No space left on device|Disk quota exceeded', 'The disk is full: make room.'),
    (
        r'Python\.h: No such file',
        "The headers of Python are missing: install them (Debian, Ubuntu: 'apt install "
        "python3-dev'), or choose another interpreter with PYTHON=...",
    ),
    (
        r'Killed signal|\bKilled\b|virtual memory exhausted|out of memory|Cannot allocate memory',
        'The compiler ran out of memory: try again with MAX_JOBS=1.',
    ),
    (
        r"(command|program) '?\S*(gcc|g\+\+|cc|c\+\+)'? (failed: No such file|not found)"
        r"|unable to execute '?\S*(gcc|g\+\+|cc|c\+\+)|\S*(g\+\+|c\+\+): not found",
        "There is no C++ compiler: install one (Debian, Ubuntu: 'apt install g++').",
    ),
    (
        r'CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerificationError',
        "pip does not trust the server's certificate: behind a proxy, set the certificate bundle "
        "('pip config set global.cert FILE').",
    ),
    (
        r'ProxyError|NewConnectionError|ConnectTimeout|ReadTimeout|Read timed out'
        r'|Temporary failure in name resolution|Connection (refused|reset|aborted)'
        r'|Max retries exceeded',
        "pip cannot reach the package index: check the network and 'pip config list' "
        '(index-url, proxy, cert).',
    ),
    (
        r'torchvision::nms|operator torchvision',
        'torch and torchvision are of different builds, usually a +cpu build of one of them: '
        "check the extra indexes in 'pip config list', then remove the environment.",
    ),
    (
        r'No matching distribution found|Could not find a version that satisfies',
        'The package index has no such version for this Python and platform: choose another '
        "interpreter with PYTHON=..., or another index ('pip config list').",
    ),
    (
        r'DO NOT MATCH THE HASHES',
        "A download was damaged: run 'pip cache purge' and try again.",
    ),
    (
        r'ResolutionImpossible|conflicting dependencies',
        'The pinned versions contradict each other: was requirements/ edited?',
    ),
)


@dataclass(frozen=True)
class Stack:
    """The packages behind the import names mmengine, mmcv, mmdet and mmseg.

    Attributes:
        name: What `--stack` calls it; `requirements/NAME.txt` lists its packages without mmcv.
        venv: Folder of its environment in the checkout.
        mmcv: The package that is compiled; `requirements/MMCV.txt` names it.
        mmdet: The package of mmdet.
        mmseg: The package of mmseg.
    """

    name: str
    venv: str
    mmcv: str
    mmdet: str
    mmseg: str

    def files(self) -> dict[str, tuple[str, ...]]:
        """Returns the files that each step depends on, in the order of the steps."""
        return {
            'venv': (),
            'torch': ('requirements/constraints.txt', 'requirements/torch.txt'),
            'libraries': (
                f'requirements/{self.name}.txt',
                'requirements/runtime.txt',
                'requirements/dev.txt',
            ),
            'opencv': ('requirements/opencv.txt',),
            'mmcv': (f'requirements/{self.mmcv}.txt',),
            'package': ('setup.py', 'pyproject.toml', 'idlevit_mm/version.py'),
            'check': (),
        }


STACKS = {
    stack.name: stack
    for stack in (
        Stack('openmmlab', '.venv', 'mmcv', 'mmdet', 'mmsegmentation'),
        Stack('onedl', '.venv-onedl', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'),
    )
}


class SetupError(Exception):
    """A failure that the person at the keyboard can do something about.

    Args:
        what: What failed, in one line.
        advice: What to do about it; found from the log where not given.
        log: The whole log of the failed command, if there is one.
    """

    def __init__(self, what: str, advice: str = '', log: Path | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.log = log
        self.advice = advice or advice_for('\n'.join(last_lines(log, 300)) if log else '')

    def report(self, where: str) -> str:
        """Returns the message: the step, the last lines of the log, where it is, what to do."""
        lines = [f'Set-up failed {where}', f'  {self.what}']
        if self.log is not None:
            lines.append('Last lines of the log:')
            lines += [f'  | {line}' for line in last_lines(self.log, 15)]
            lines.append(f'Whole log: {self.log}')
        lines.append(f'What to do: {self.advice}')
        lines.append('Then run the same command again: finished steps are not repeated.')
        return '\n'.join(lines)


def read_text(path: Path | None) -> str:
    """Returns the text of a file, empty where there is none."""
    if path is None or not path.is_file():
        return ''
    return path.read_text(encoding='utf-8', errors='replace')


def last_lines(path: Path, count: int) -> list[str]:
    """Returns the last `count` lines of a file that are not blank, each cut to 200 characters."""
    lines = [line.rstrip() for line in read_text(path).splitlines() if line.strip()]
    return [line if len(line) <= 200 else line[:197] + '...' for line in lines[-count:]]


def advice_for(log: str) -> str:
    """Returns what to do about the failure that a log tells of."""
    for pattern, advice in ADVICE:
        if re.search(pattern, log):
            return advice
    return 'Read the log; the first error in it is usually the cause.'


def duration(seconds: float) -> str:
    """Returns a time span as people write it: `44 s`, `9 min 05 s`."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f'{seconds} s'
    return f'{seconds // 60} min {seconds % 60:02d} s'


# ------------------------------------------------------------------------------------ progress


class Progress:
    """Shows the steps: `[2/7] torch 2.11.0 ... done (44 s)`.

    On a terminal the line of the running step is rewritten; elsewhere a line is added twice a
    minute, so that a log shows that the set-up is alive.

    Args:
        total: Number of steps.
        stream: Where to write; a terminal is recognised.
        beat: Seconds between two lines where the stream is no terminal.
    """

    def __init__(self, total: int, stream: TextIO | None = None, beat: float = 30.0) -> None:
        self.total = total
        self.stream = sys.stdout if stream is None else stream
        self.terminal = bool(getattr(self.stream, 'isatty', lambda: False)())
        self.beat = beat
        self.label = ''
        self.started = self.last = 0.0
        self.line_open = False

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def start(self, number: int, title: str) -> None:
        """Opens the line of a step."""
        self.label = f'[{number}/{self.total}] {title}'
        self.started = self.last = time.monotonic()
        self._write(f'{self.label} ... ')
        self.line_open = True

    def update(self, text: str) -> None:
        """Shows what the running step is doing; cheap enough to be called all the time."""
        now = time.monotonic()
        if self.terminal:
            width = max(20, shutil.get_terminal_size().columns - 1)
            line = f'{self.label} ... {duration(now - self.started)}'
            line = (f'{line}: {text}' if text else line)[:width]
            self._write(f'\r\x1b[2K{line}')
        elif now - self.last >= self.beat:
            short = text if len(text) <= 90 else text[:87] + '...'
            self.note(duration(now - self.started) + (f': {short}' if short else ''))
            self.last = now

    def note(self, text: str) -> None:
        """Writes a line of its own below the line of the step."""
        lead = '\r\x1b[2K' + self.label + '\n' if self.terminal else '\n' * self.line_open
        self._write(f'{lead}      {text}\n')
        self.line_open = False

    def finish(self, word: str = 'done') -> None:
        """Closes the line of a step."""
        text = f'{word} ({duration(time.monotonic() - self.started)})'
        if self.terminal:
            self._write(f'\r\x1b[2K{self.label} ... {text}\n')
        else:
            self._write(f'{text}\n' if self.line_open else f'      {text}\n')
        self.line_open = False

    def abort(self) -> None:
        """Ends the line of a step that failed."""
        if self.terminal or self.line_open:
            self._write('\n')
        self.line_open = False


class CompileProgress:
    """Turns the output of pip and ninja into one line of progress.

    ninja writes `[k/n] command` when it starts or finishes a command.
    """

    def __init__(self) -> None:
        self.done = self.total = 0
        self.since: float | None = None
        self.first = 0
        self.activity = 'preparing'

    def feed(self, line: str) -> None:
        """Takes one line of the log."""
        match = re.match(r'\s*\[(\d+)/(\d+)\]\s', line)
        if match:
            self.done, self.total = int(match.group(1)), int(match.group(2))
            if self.since is None:
                self.since, self.first = time.monotonic(), self.done
        elif "building 'mmcv._ext' extension" in line:
            self.activity = 'compiling the first files'
        elif 'creating build/bdist' in line or 'running install' in line:
            self.activity = 'packing the wheel'

    def text(self) -> str:
        """Returns the progress: files compiled, and how long the rest takes about."""
        if not self.total or self.activity == 'packing the wheel':
            return self.activity
        text = f'compiled {self.done} of {self.total} files'
        fresh = self.done - self.first
        if self.since is not None and fresh >= 3:
            left = (time.monotonic() - self.since) / fresh * (self.total - self.done)
            text += f', about {duration(left)} left'
        return text


# ------------------------------------------------------------------------------------ commands


def clean_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment for child processes: nothing from outside gets onto their path."""
    drop = ('PYTHONPATH', 'PYTHONHOME', 'PYTHONSTARTUP', '__PYVENV_LAUNCHER__', 'VIRTUAL_ENV')
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env.update(PYTHONNOUSERSITE='1', PYTHONUNBUFFERED='1', PIP_USER='0')
    env.update(extra or {})
    return env


def kill_group(process: subprocess.Popen) -> None:
    """Ends a process and everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            if number == signal.SIGTERM:
                # The leader has gone; what it left behind must not go on compiling.
                time.sleep(0.2)


def run_logged(
    command: Sequence[str],
    log: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_tick: Callable[[], None] = lambda: None,
    env: Mapping[str, str] | None = None,
    keep_open: Iterable[int] = (),
) -> int:
    """Runs a command, its whole output going to a log file.

    Args:
        command: The command and its arguments.
        log: File that the output is appended to.
        on_line: Called with each line of output, from another thread.
        on_tick: Called twice a second.
        env: The whole environment of the command.
        keep_open: File descriptors that the command inherits.

    Returns:
        The command's exit status. An exception (Ctrl-C) ends the command with all its children.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a', encoding='utf-8', errors='replace') as sink:
        sink.write('$ ' + ' '.join(command) + '\n')
        sink.flush()
        # A session of its own, so that ninja's compilers can be ended together with pip.
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            text=True,
            encoding='utf-8',
            errors='replace',
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )

        def pump() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                sink.write(line)
                sink.flush()
                on_line(line.rstrip('\n'))

        reader = threading.Thread(target=pump, daemon=True)
        reader.start()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=TICK)
                    break
                on_tick()
        except BaseException:
            kill_group(process)
            raise
        finally:
            reader.join(timeout=5)
        sink.write(f'# exit status {process.returncode}\n')
    return process.returncode


def probe(python: str, code: str, *arguments: str, timeout: float = 300.0) -> tuple[str, str]:
    """Runs a few lines of Python in another interpreter.

    Returns:
        Its standard output and, where it failed, why (otherwise empty).
    """
    try:
        done = subprocess.run(
            [python, '-c', code, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors='replace',
            timeout=timeout,
            env=clean_env(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return '', str(error)
    if done.returncode == 0:
        return done.stdout, ''
    if done.returncode < 0:
        return done.stdout, f'it crashed with signal {-done.returncode}'
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return done.stdout, lines[-1].strip() if lines else f'exit status {done.returncode}'


class FileLock:
    """An advisory lock on a file, held while the `with` block runs.

    The kernel gives it back when its holder dies, so a stale lock cannot exist. File systems
    without locks are used without one.

    Args:
        path: The lock file; made if needed, never removed.
        on_wait: Called twice a second while somebody else holds it, with the holder's id.
    """

    def __init__(self, path: Path, on_wait: Callable[[str], None]) -> None:
        self.path = path
        self.on_wait = on_wait
        self.fd = -1

    def __enter__(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                self.on_wait(read_text(self.path).strip() or 'unknown')
                time.sleep(TICK)
            except OSError:
                break
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, str(os.getpid()).encode(), 0)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)
        self.fd = -1


# ----------------------------------------------------------------------------- choosing Python


def describe_python(command: str) -> dict | None:
    """Returns version, executable, `venv` and `headers` of an interpreter, None if it is none."""
    path = shutil.which(command)
    if path is None:
        return None
    output, why = probe(path, PROBE_PYTHON, timeout=30)
    if why:
        return None
    try:
        return json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return None


def python_problem(info: dict | None) -> str:
    """Returns why an interpreter cannot be used, empty if it can."""
    if info is None:
        return 'not found, or it does not run'
    version = '.'.join(map(str, info['version']))
    if tuple(info['version'][:2]) not in SUPPORTED:
        return f'it is Python {version}'
    if not info['venv']:
        return f'Python {version} without the venv module'
    return ''


def find_python(wanted: str = '', describe: Callable[[str], dict | None] = describe_python) -> dict:
    """Chooses the interpreter that the environment is built with.

    Args:
        wanted: The interpreter asked for; no other is then tried.
        describe: Looks at one interpreter.

    Returns:
        Its description. One that has the headers that compiling needs is preferred.

    Raises:
        SetupError: If no interpreter fits.
    """
    found, problems = [], []
    for command in [wanted] if wanted else [*CANDIDATES, sys.executable]:
        info = describe(command)
        problem = python_problem(info)
        if problem:
            problems.append(f'{command}: {problem}')
        elif info is not None:
            found.append(info)
            if info['headers']:
                break
    if found:
        return next((info for info in found if info['headers']), found[0])
    asked = f'PYTHON={wanted} cannot be used' if wanted else 'no usable Python was found'
    raise SetupError(
        f'{asked}; Python 3.10, 3.11 or 3.12 with its venv module is needed '
        f'({"; ".join(problems)})',
        "install one (Debian, Ubuntu: 'apt install python3-venv python3-dev'), or name one that "
        'is not on the PATH, as in: make setup PYTHON=/path/to/python3.11',
    )


# ------------------------------------------------------------------------- state of the set-up


class State:
    """What has been finished in an environment, kept in a file inside it.

    Args:
        path: The file; a missing or damaged one means that nothing has been finished.

    Attributes:
        steps: The key that each finished step had.
        running: The step that was begun and not finished, empty if there is none.
        made_here: Whether the set-up made the environment, and may therefore delete it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, str] = {}
        self.running = ''
        self.made_here = False
        with contextlib.suppress(OSError, ValueError, AttributeError):
            data = json.loads(path.read_text(encoding='utf-8'))
            self.steps = {str(name): str(key) for name, key in data.get('steps', {}).items()}
            self.running = str(data.get('running', ''))
            self.made_here = bool(data.get('made_here', False))

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {'made_here': self.made_here, 'running': self.running, 'steps': self.steps}
        text = json.dumps(data, indent=1)
        temporary = self.path.with_suffix('.tmp')
        temporary.write_text(text, encoding='utf-8')
        os.replace(temporary, self.path)

    def begin(self, name: str, before: Iterable[str]) -> bool:
        """Notes that a step starts; it and the steps after it no longer count as finished.

        Returns:
            Whether this very step was interrupted the last time.
        """
        interrupted = self.running == name
        self.steps = {step: self.steps[step] for step in before if step in self.steps}
        self.running = name
        self._save()
        return interrupted

    def finish(self, name: str, key: str) -> None:
        """Notes that a step is finished."""
        self.steps[name] = key
        self.running = ''
        self._save()


def chain_keys(
    files: Mapping[str, Sequence[str]], identity: Sequence[str], root: Path
) -> dict[str, str]:
    """Returns a key per step; it changes with its files and with every earlier step's key.

    Args:
        files: The files that each step depends on, in the order of the steps.
        identity: What else all of them depend on.
        root: Folder that the files lie in.
    """
    keys, previous = {}, json.dumps(list(identity))
    for name, paths in files.items():
        digest = hashlib.sha256(f'{previous}\n{name}'.encode())
        for path in paths:
            digest.update(f'\n{path}\n'.encode())
            digest.update((root / path).read_bytes())
        keys[name] = previous = digest.hexdigest()
    return keys


def read_pins(path: Path) -> dict[str, str]:
    """Returns the versions that a constraints file pins, without those behind a marker."""
    pattern = r'^([A-Za-z0-9._-]+)==([^\s;#]+)\s*(?:#.*)?$'
    return dict(re.findall(pattern, read_text(path), flags=re.MULTILINE))


def installed_files(record: Path) -> Iterator[tuple[str, int | None]]:
    """Yields the path and the size of every file that a package's RECORD lists."""
    for line in read_text(record).splitlines():
        fields = line.rsplit(',', 2)
        if len(fields) == 3:
            size = int(fields[2]) if fields[2].isdigit() else None
            yield fields[0].strip('"'), size


def heal_site_packages(site: Path) -> list[str]:
    """Makes pip notice packages that an interrupted pip left half installed.

    pip takes a package for installed as soon as its `.dist-info` has metadata, whether or not all
    files arrived. Of each such package the `.dist-info` is removed, so that pip installs it again.

    Args:
        site: The site-packages folder.

    Returns:
        The names of the packages that were incomplete.
    """
    for leftover in site.glob('~*'):
        # What pip had set aside while it replaced a package.
        shutil.rmtree(leftover, ignore_errors=True)
    infos = sorted(site.glob('*.dist-info'))
    listed = {info: list(installed_files(info / 'RECORD')) for info in infos}
    owners = collections.Counter(path for files in listed.values() for path, _ in files)
    broken = []
    for info, files in listed.items():
        complete = bool(files)
        for path, size in files:
            if path.endswith('.pyc'):
                continue
            target = site / path
            # Two OpenCV packages own the same files: then the size is the other one's.
            if not target.is_file() or (
                size is not None and owners[path] == 1 and target.stat().st_size != size
            ):
                complete = False
                break
        if not complete:
            shutil.rmtree(info)
            broken.append(info.name[: -len('.dist-info')])
    return broken


# -------------------------------------------------------------------------- wheel cache of mmcv


def cache_root(env: Mapping[str, str], fallback: Path) -> Path:
    """Returns the folder for compiled wheels, `fallback` where the usual one cannot be written."""
    if env.get('IDLEVIT_MM_CACHE'):
        wanted = Path(env['IDLEVIT_MM_CACHE']).expanduser()
    elif env.get('XDG_CACHE_HOME'):
        wanted = Path(env['XDG_CACHE_HOME']).expanduser() / 'idlevit_mm'
    elif env.get('HOME'):
        wanted = Path(env['HOME']) / '.cache' / 'idlevit_mm'
    else:
        return fallback
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted.resolve()
    except OSError as error:
        if env.get('IDLEVIT_MM_CACHE'):
            raise SetupError(
                f'IDLEVIT_MM_CACHE={wanted} cannot be written ({error})',
                'name a folder that can be written, or unset it.',
            ) from error
        return fallback


def wheel_key(package: str, version: str, torch: str, python: Sequence[int], variant: str) -> str:
    """Returns the name of the cache folder of one build of mmcv.

    Args:
        package: The package that is built: mmcv or onedl-mmcv.
        version: Its version.
        torch: Version of torch with its local tag: 2.11.0+cu130.
        python: Major and minor version of Python.
        variant: `cpu`, or CUDA's version and the devices: `cu130-sm90`.
    """
    place = f'{platform.system()}_{platform.machine()}'.lower()
    tag = f'cp{python[0]}{python[1]}'
    text = f'{package}-{version}-torch-{torch}-{tag}-{place}-{variant}'
    return re.sub(r'[^A-Za-z0-9._+-]', '_', text)


def wheel_problem(path: Path) -> str:
    """Returns why a wheel file is unusable as a file, empty if it is whole and has the ops."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            if bad is not None:
                return f'{bad} in it is damaged'
            if not any(re.match(r'mmcv/_ext\..*\.so$', name) for name in archive.namelist()):
                return 'it has no compiled ops'
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        return str(error)
    return ''


def cuda_variant(torch_info: Mapping, choice: str, toolkit: Callable[[str], str]) -> str:
    """Returns which ops of mmcv to build: `cpu`, or a name for CUDA's version and the devices.

    Args:
        torch_info: What torch sees: `cuda`, `cuda_home`, `capabilities`.
        choice: `auto`, `cpu` or `cuda`.
        toolkit: Returns the version of the CUDA toolkit in a folder, empty if there is none.

    Raises:
        SetupError: If CUDA ops were asked for and cannot be built.
    """
    if choice not in ('auto', 'cpu', 'cuda'):
        raise SetupError(
            f'IDLEVIT_MM_OPS is {choice!r}; allowed are auto, cpu and cuda', 'correct it.'
        )
    if choice == 'cpu':
        return 'cpu'
    wanted, home = torch_info['cuda'] or '', torch_info['cuda_home']
    found = toolkit(home) if home else ''
    if not torch_info['capabilities']:
        problem = 'torch sees no GPU'
    elif not found:
        problem = 'no CUDA toolkit (nvcc) was found'
    elif found.split('.')[0] != wanted.split('.')[0]:
        problem = f'torch was built with CUDA {wanted}, the toolkit in {home} is {found}'
    else:
        devices = '-'.join('sm' + capability for capability in torch_info['capabilities'])
        return f'cu{wanted.replace(".", "")}-{devices}'
    if choice == 'cuda':
        raise SetupError(
            f'IDLEVIT_MM_OPS=cuda, but {problem}', 'install it, set CUDA_HOME, or use cpu.'
        )
    return 'cpu'


def toolkit_version(home: str) -> str:
    """Returns the version of the CUDA toolkit in a folder, empty if there is none."""
    try:
        done = subprocess.run(
            [str(Path(home) / 'bin' / 'nvcc'), '--version'],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ''
    match = re.search(r'release (\d+\.\d+)', done.stdout)
    return match.group(1) if match else ''


def free_memory() -> int:
    """Returns the memory that is available, in bytes; a container's limit counts."""
    amounts = []
    match = re.search(r'^MemAvailable:\s+(\d+) kB', read_text(Path('/proc/meminfo')), re.MULTILINE)
    if match:
        amounts.append(int(match.group(1)) * 1024)
    for limit in ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'):
        text = read_text(Path(limit)).strip()
        if text.isdigit():
            amounts.append(int(text))
    if not amounts:
        amounts.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    return min(amounts)


def count_cores() -> int:
    """Returns the cores that this process may use; a container's quota counts."""
    affinity = getattr(os, 'sched_getaffinity', None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = read_text(Path('/sys/fs/cgroup/cpu.max')).split()
    if len(quota) == 2 and all(part.isdigit() for part in quota) and int(quota[1]):
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def compile_jobs(env: Mapping[str, str], cores: int, memory: int) -> int:
    """Returns how many compilers may run at once.

    Args:
        env: Environment; MAX_JOBS in it decides.
        cores: Cores that may be used.
        memory: Bytes of memory that are available.

    Raises:
        SetupError: If MAX_JOBS is no positive whole number.
    """
    text = env.get('MAX_JOBS', '').strip()
    if text:
        if not text.isdigit() or int(text) < 1:
            raise SetupError(f'MAX_JOBS is {text!r}; a whole number above 0 is needed', 'set it.')
        return int(text)
    return max(1, min(cores, memory // BYTES_PER_JOB))


def find_compiler(env: Mapping[str, str]) -> str | None:
    """Returns the C++ compiler that torch would use, None if there is none."""
    names = [env['CXX'].split()[0]] if env.get('CXX', '').strip() else ['c++', 'g++']
    return next((path for path in map(shutil.which, names) if path), None)


# ---------------------------------------------------------------------------------- the set-up


class Setup:
    """Sets up one environment of a checkout.

    Args:
        root: The checkout.
        python: The interpreter asked for, empty to choose one.
        progress: Shows the steps; by default on standard output.
        stack: The packages to install.
    """

    # What a finished step has left in site-packages; without it, it was removed by hand.
    TRACES: Mapping[str, tuple[str, ...]] = {
        'torch': ('torch/version.py', 'torchvision/version.py'),
        'libraries': ('mmengine/version.py', 'mmdet/version.py', 'mmseg/version.py'),
        'opencv': ('cv2/__init__.py',),
        'mmcv': ('mmcv/_ext.*.so',),
        'package': ('idlevit_mm-*.dist-info',),
    }

    def __init__(
        self,
        root: Path,
        python: str = '',
        progress: Progress | None = None,
        stack: Stack = STACKS['openmmlab'],
    ) -> None:
        self.root = root
        self.wanted_python = python
        self.stack = stack
        self.files = stack.files()
        self.progress = progress or Progress(len(self.files))
        self.venv = root / stack.venv
        self.python = str(self.venv / 'bin' / 'python')
        self.logs = root / 'build' / 'setup' / stack.name
        self.constraints = root / 'requirements' / 'constraints.txt'
        self.pins = read_pins(self.constraints)
        self.state = State(self.venv / STATE_NAME)
        self.base: dict = {}
        self.where = 'before the first step'
        self.log = self.logs / 'setup.log'
        self.interrupted = self.waited = False
        self.lock: FileLock | None = None

    def titles(self) -> dict[str, str]:
        """Returns what each step is called on the screen."""
        pin, stack = self.pins, self.stack
        packages = [f'{name} {pin[name]}' for name in (stack.mmdet, stack.mmseg)]
        return {
            'venv': f'Python {".".join(map(str, self.base["version"]))} in {stack.venv}',
            'torch': f'torch {pin["torch"]}, torchvision {pin["torchvision"]}',
            'libraries': f'{", ".join(packages)} and others',
            'opencv': f'opencv {pin["opencv-python-headless"]}, headless',
            'mmcv': f'{stack.mmcv} {pin[stack.mmcv]} with ops',
            'package': 'idlevit_mm, editable',
            'check': 'check of the whole',
        }

    def keys(self, version: Sequence[int]) -> dict[str, str]:
        """Returns the key of each step for a Python version."""
        identity = [
            str(RECIPE),
            str(self.root),
            f'{version[0]}.{version[1]}',
            platform.system(),
            platform.machine(),
            os.environ.get('IDLEVIT_MM_OPS', ''),
        ]
        return chain_keys(self.files, identity, self.root)

    def choose_python(self) -> None:
        """Takes the interpreter of an environment that works, or looks for one."""
        inside = describe_python(self.python)
        if self.wanted_python or python_problem(inside):
            self.base = find_python(self.wanted_python)
        elif inside is not None:
            self.base = inside

    def up_to_date(self) -> bool:
        """Returns whether there is nothing to do, without changing anything."""
        if self.state.running or not self.state.steps or not Path(self.python).exists():
            return False
        self.choose_python()
        return self.state.steps == self.keys(self.base['version']) and all(
            map(self._still_there, self.files)
        )

    def run(self, force: bool = False) -> bool:
        """Does the steps that are not finished.

        Args:
            force: Do all of them.

        Returns:
            Whether there was anything to do.
        """
        if not force and self.up_to_date():
            return False
        # Without a Python there is nothing to wait for.
        self.choose_python()
        # One lock for all stacks: they install the same checkout.
        with FileLock(self.logs.parent / 'lock', self._waiting) as self.lock:
            # Another set-up of this checkout may have finished everything meanwhile.
            self.state = State(self.venv / STATE_NAME)
            self.choose_python()
            keys, titles = self.keys(self.base['version']), self.titles()
            if force:
                self.state.steps = {}
            self._preflight()
            names = list(self.files)
            for index, name in enumerate(names):
                if self.state.steps.get(name) == keys[name] and self._still_there(name):
                    continue
                self.where = f'in step {index + 1}/{len(names)}: {titles[name]}'
                self.log = self.logs / f'{index + 1}-{name}.log'
                self.log.unlink(missing_ok=True)
                self.progress.start(index + 1, titles[name])
                if name == 'venv':
                    self._protect_foreign_venv()
                self.interrupted = self.state.begin(name, names[:index])
                if self.interrupted:
                    self._heal()
                word = getattr(self, f'step_{name}')() or 'done'
                self.state.finish(name, keys[name])
                self.progress.finish(word)
        return True

    def _waiting(self, holder: str) -> None:
        if not self.waited:
            self.progress.note(f'another set-up of this checkout runs (process {holder}): waiting')
        self.waited = True

    def _still_there(self, name: str) -> bool:
        if name != 'venv':
            return all(map(self._site, self.TRACES.get(name, ())))
        inside = describe_python(self.python)
        return inside is not None and inside['version'][:2] == self.base['version'][:2]

    def _preflight(self) -> None:
        """Finds out before any download what would fail after it."""
        if 'torch' not in self.state.steps and not self._site('torch'):
            place = self.venv if self.venv.exists() else self.root
            free = shutil.disk_usage(place).free
            if free < BYTES_NEEDED:
                raise SetupError(
                    f'{free / 1024**3:.1f} GiB are free on the disk of {self.root}, '
                    f'{BYTES_NEEDED / 1024**3:.0f} GiB are needed',
                    'make room.',
                )
        if 'mmcv' in self.state.steps or self._site('mmcv/_ext.*.so'):
            return
        tag = 'cp{}{}'.format(*self.base['version'][:2])
        package, pin = self.stack.mmcv, self.pins
        pattern = f'wheels/{package}-{pin[package]}-torch-{pin["torch"]}*-{tag}-*/*.whl'
        if any(self._cache().glob(pattern)):
            return
        if find_compiler(os.environ) is None:
            raise SetupError(
                'mmcv has to be compiled and there is no C++ compiler (c++, g++, $CXX)',
                "install one (Debian, Ubuntu: 'apt install g++').",
            )
        if not self.base['headers']:
            raise SetupError(
                f'mmcv has to be compiled and {self.base["executable"]} has no headers (Python.h)',
                "install them (Debian, Ubuntu: 'apt install python3-dev'), or choose another "
                'interpreter with PYTHON=...',
            )

    def _site(self, path: str) -> bool:
        return any(self.venv.glob(f'lib/python3.*/site-packages/{path}'))

    def _cache(self) -> Path:
        return cache_root(os.environ, self.root / 'build' / 'cache')

    def _protect_foreign_venv(self) -> None:
        """Raises an error rather than delete an environment that somebody made by hand."""
        if self.state.made_here or not self.venv.exists() or not any(self.venv.iterdir()):
            return
        if not self._venv_usable():
            raise SetupError(
                f'{self.venv} was not made by this set-up, and it does not run, has no pip or has '
                'another Python than is wanted',
                f"move it away or remove it ('rm -rf {self.stack.venv}').",
            )

    def _venv_usable(self) -> bool:
        inside = describe_python(self.python)
        return (
            inside is not None
            and inside['version'][:2] == self.base['version'][:2]
            and not probe(self.python, 'import pip')[1]
            # The scripts of an environment that was moved start with a path that is gone.
            and str(self.venv) in read_text(self.venv / 'bin' / 'activate')
        )

    def _heal(self) -> None:
        for site in self.venv.glob('lib/python3.*/site-packages'):
            for name in heal_site_packages(site):
                self.progress.note(f'{name} was left incomplete and is installed again')

    # ------------------------------------------------------------------------------- the steps

    def _command(
        self,
        command: Sequence[str],
        what: str,
        env: Mapping[str, str] | None = None,
        follow: CompileProgress | None = None,
    ) -> None:
        """Runs one command of a step, or raises a SetupError with its log."""
        latest = ['']

        def on_line(line: str) -> None:
            if follow is not None:
                follow.feed(line)
            elif line.strip():
                latest[0] = line.strip()

        def on_tick() -> None:
            self.progress.update(latest[0] if follow is None else follow.text())

        # While a child lives, the lock of the checkout is held: nothing can install beside an
        # orphaned pip.
        keep_open = (self.lock.fd,) if self.lock is not None else ()
        status = run_logged(command, self.log, on_line, on_tick, clean_env(env), keep_open)
        if status:
            raise SetupError(f'{what} ended with exit status {status}', log=self.log)

    def _pip(
        self,
        *arguments: str,
        what: str,
        env: Mapping[str, str] | None = None,
        follow: CompileProgress | None = None,
    ) -> None:
        pip = [self.python, '-m', 'pip', '--disable-pip-version-check', '--no-input']
        self._command([*pip, *arguments], what, env, follow)

    def _install(self, *arguments: str) -> None:
        # Compiling all of torch to bytecode takes longer than what its first import compiles.
        options = ('--no-compile', '-c', str(self.constraints))
        self._pip('install', *options, *arguments, what='pip install')

    def _requirements(self, *names: str) -> list[str]:
        folder = self.root / 'requirements'
        return [part for name in names for part in ('-r', str(folder / f'{name}.txt'))]

    def step_venv(self) -> str:
        """Makes the environment, or takes over one that runs."""
        made = self.state.made_here
        if self._venv_usable() and not (made and self.interrupted):
            return 'kept'
        if self.venv.is_symlink():
            raise SetupError(f'{self.venv} is a link and has to be made anew', 'remove the link.')
        if self.venv.exists():
            shutil.rmtree(self.venv)
        self.state.made_here = True
        self.state.begin('venv', ())
        self._command(
            [self.base['executable'], '-m', 'venv', str(self.venv)], 'making the environment'
        )
        return 'done'

    def step_torch(self) -> None:
        """Installs torch first: mmcv's build imports it."""
        self._install(*self._requirements('torch'))
        why = probe(self.python, PROBE_TORCHVISION)[1]
        if why:
            raise SetupError(f'torchvision does not work: {why}', advice_for(why), self.log)

    def step_libraries(self) -> None:
        """Installs everything else that is not compiled."""
        # What comes as source only is built with the pinned setuptools of the step before.
        names = (self.stack.name, 'runtime', 'dev')
        self._install('--no-build-isolation', *self._requirements(*names))

    def step_opencv(self) -> None:
        """Puts the headless cv2 over the one that needs libGL."""
        self._install('--no-deps', '--force-reinstall', *self._requirements('opencv'))

    def step_package(self) -> None:
        """Installs this checkout."""
        self._install('--no-deps', '--no-build-isolation', '-e', str(self.root))

    def step_check(self) -> None:
        """Checks that the requirements hold together and that everything imports."""
        self._pip('check', what='pip check')
        self._command([self.python, '-c', PROBE_IMPORTS], 'importing the packages')

    # ------------------------------------------------------------------------------------ mmcv

    def _mmcv_problem(self, variant: str) -> str:
        devices = ['cpu'] if variant == 'cpu' else ['cpu', 'cuda']
        return probe(self.python, PROBE_MMCV, self.pins[self.stack.mmcv], *devices)[1]

    def _install_wheel(self, wheel: Path) -> None:
        arguments = ('--no-compile', '--no-deps', '--no-index', '--force-reinstall', str(wheel))
        self._pip('install', *arguments, what='installing the compiled wheel')

    def step_mmcv(self) -> str:
        """Installs mmcv with ops that work with this torch: as it is, from the cache, or built."""
        output, why = probe(self.python, PROBE_TORCH)
        if why:
            raise SetupError(f'torch does not work: {why}', f'remove {self.stack.venv}.')
        info = json.loads(output.splitlines()[-1])
        choice = os.environ.get('IDLEVIT_MM_OPS') or 'auto'
        variant = cuda_variant(info, choice, toolkit_version)
        if (
            not self.interrupted
            and self._site('mmcv/_ext.*.so')
            and not self._mmcv_problem(variant)
        ):
            return 'kept'
        try:
            return self._provide_mmcv(info, variant)
        except SetupError as error:
            if variant == 'cpu' or choice == 'cuda':
                raise
            self.progress.note(f'the CUDA ops do not build here ({error.what}), log: {error.log}')
            self.progress.note('CPU ops are built instead; IDLEVIT_MM_OPS=cuda insists on CUDA')
            return self._provide_mmcv(info, 'cpu')

    def _provide_mmcv(self, info: Mapping, variant: str) -> str:
        package = self.stack.mmcv
        key = wheel_key(package, self.pins[package], info['torch'], self.base['version'], variant)
        folder = self._cache() / 'wheels' / key

        def waiting(holder: str) -> None:
            self.progress.update(f'another set-up (process {holder}) compiles it: waiting')

        with FileLock(folder / 'lock', waiting):
            for wheel in sorted(folder.glob('*.whl')):
                problem = wheel_problem(wheel) or self._try_wheel(wheel, variant)
                if not problem:
                    return 'done, from the cache'
                self.progress.note(f'the cached wheel is of no use: {problem}')
                self.progress.note(f'it is removed and compiled again: {wheel}')
                wheel.unlink()
            wheel = self._build_mmcv(folder, self._cache() / 'build' / key, variant)
            problem = self._try_wheel(wheel, variant)
            if problem:
                wheel.unlink()
                raise SetupError(
                    f'{package} was compiled but does not work: {problem}',
                    'compiler and Python may not fit this torch: try another PYTHON=... or CXX=...',
                    self.log,
                )
        return 'done'

    def _try_wheel(self, wheel: Path, variant: str) -> str:
        try:
            self._install_wheel(wheel)
        except SetupError as error:
            return error.what
        return self._mmcv_problem(variant)

    def _build_mmcv(self, folder: Path, work: Path, variant: str) -> Path:
        """Compiles mmcv; the object files stay until it is done, so that it can be resumed."""
        jobs = compile_jobs(os.environ, count_cores(), free_memory())
        env = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': str(jobs)}
        if variant == 'cpu':
            # mmcv's setup.py wants nvcc as soon as torch sees a GPU.
            env.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')
        source = self._unpack_mmcv(work, env)
        follow = CompileProgress()
        self.progress.note(
            f'compiling for this Python and torch ({variant} ops, {jobs} at a time): '
            'about 16 minutes of one core, once'
        )
        output = Path(tempfile.mkdtemp(prefix='wheel-', dir=work))
        # Built in place and the standard way: the old way deletes the objects after a failure.
        self._pip(
            'wheel', '-v', '--no-deps', '--no-build-isolation', '--use-pep517',
            '--wheel-dir', str(output), str(source),
            what=f'compiling {self.stack.mmcv}', env=env, follow=follow,
        )  # fmt: skip
        built = next(output.glob('*.whl'))
        target = folder / built.name
        temporary = folder / f'.{built.name}.{os.getpid()}.tmp'
        shutil.copyfile(built, temporary)
        os.replace(temporary, target)
        shutil.rmtree(work, ignore_errors=True)
        return target

    def _unpack_mmcv(self, work: Path, env: Mapping[str, str]) -> Path:
        done, package = work / 'unpacked', self.stack.mmcv
        if not done.is_file():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            self._pip(
                'download', '--no-deps', '--no-build-isolation', '--no-binary', package,
                '-c', str(self.constraints), *self._requirements(package), '-d', str(work),
                what=f'downloading the source of {package}', env=env,
            )  # fmt: skip
            archive = next(work.glob('*.tar.gz'))
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, 'data_filter'):
                    tar.extractall(work, filter='data')
                else:
                    # A Python before the filters; pip has checked the archive's hash.
                    tar.extractall(work)
            done.write_text(archive.name[: -len('.tar.gz')], encoding='utf-8')
        else:
            self.progress.note('going on with the compilation that was interrupted')
        return work / done.read_text(encoding='utf-8')


def terminate(number: int, frame: object) -> None:
    """Lets a signal end the set-up the way Ctrl-C does."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the set-up; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').split('\n')[0],
        epilog=(__doc__ or '')[(__doc__ or '').find('Environment variables:') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--python',
        default=os.environ.get('PYTHON', ''),
        help='interpreter to build the environment with (default: the first that fits)',
    )
    parser.add_argument(
        '--stack',
        choices=sorted(STACKS),
        default='openmmlab',
        help='whose mmengine, mmcv, mmdet and mmseg: the official packages, into .venv (default), '
        'or the forks onedl-*, into .venv-onedl',
    )
    parser.add_argument('--force', action='store_true', help='do every step again')
    args = parser.parse_args(arguments)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminate)
    setup = Setup(ROOT, args.python, stack=STACKS[args.stack])
    started = time.monotonic()
    try:
        if setup.run(args.force):
            print(f'Set-up finished in {duration(time.monotonic() - started)}.', flush=True)
    except SetupError as error:
        setup.progress.abort()
        print(error.report(setup.where), file=sys.stderr)
        return 1
    except OSError as error:
        setup.progress.abort()
        failure = SetupError(str(error), advice_for(str(error)))
        print(failure.report(setup.where), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        setup.progress.abort()
        print('Set-up was interrupted; the same command goes on from here.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
