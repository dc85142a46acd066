"""Installs mmcv or onedl-mmcv with ops for this environment's torch: `build_mmcv.py mmcv 2.1.0`.

The wheel comes from the cache, or is built from the source archive: for the CPU as a unity build,
a handful of files in place of 77 that each parse torch's headers; for CUDA by mmcv's own build.
IDLEVIT_MM_CACHE is where wheels are kept, by default `${XDG_CACHE_HOME:-~/.cache}/idlevit_mm`.
IDLEVIT_MM_OPS is `cpu` or `cuda`; by default CUDA where torch sees a GPU and nvcc is there.
MAX_JOBS is how many compilers may run at once; by default one per core, as memory allows.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

# Files of `cpu/` that define names or macros which others define too.
ALONE = ['active_rotated_filter', 'psamask', 'roi_align', 'roi_align_rotated', 'sparse_indice']
ALONE += ['rotated_feature_align', 'sparse_maxpool', 'sparse_reordering']
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check', '--no-input')
INDEX = "the package index does not give it: check the network and 'pip config list'"
REMEDIES = {
    'No space left|quota exceeded': 'the disk is full: make room',
    'Killed|out of memory|memory exhausted|Cannot allocate': 'memory ran out: set MAX_JOBS=1',
    "'[^']*[+][+]' failed: No such|[+][+]: not found": "install a C++ compiler: 'apt install g++'",
    'Python.h: No such': "install the headers of Python: 'apt install python3-dev'",
    'Max retries|NewConnection|timed out|SSLError|No matching distribution': INDEX,
}
PROBE = """
import sys, torch
from mmcv.ops import nms, roi_align
for device in map(torch.device, sys.argv[1:]):
    with device:
        boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.], [20., 20., 30., 30.]])
        assert nms(boxes, torch.tensor([.9, .8, .7]), 0.5)[1].tolist() == [0, 2], 'nms is wrong'
        image, roi = torch.arange(16.).view(1, 1, 4, 4), torch.tensor([[0., 1., 1., 3., 3.]])
        assert roi_align(image, roi, 1).item() == 7.5, 'roi_align is wrong'
"""


def wheel_folder(package: str, version: str, torch_version: str, ops: str) -> Path:
    """Returns the folder of the wheel for the running Python on this platform."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    place = 'cp{}{}-{}'.format(*sys.version_info[:2], sysconfig.get_platform().replace('-', '_'))
    key = f'{package}-{version}-torch-{torch_version}-{place}-{ops}'
    return Path(os.environ.get('IDLEVIT_MM_CACHE') or f'{cache}/idlevit_mm', 'wheels', key)


def choose_ops(choice: str) -> str:
    """Returns which ops to build: `cpu`, or CUDA's version and the kind of GPU."""
    if choice not in ('', 'cpu', 'cuda'):
        sys.exit(f'IDLEVIT_MM_OPS is {choice!r}: cpu and cuda are allowed')
    if choice != 'cpu' and torch.cuda.is_available():
        from torch.utils.cpp_extension import CUDA_HOME  # warns where there is no GPU

        if CUDA_HOME:
            return 'cu{}-sm{}{}'.format(torch.version.cuda, *torch.cuda.get_device_capability())
    if choice == 'cuda':
        sys.exit('IDLEVIT_MM_OPS=cuda needs a GPU that torch sees, and nvcc in CUDA_HOME')
    return 'cpu'


def compile_jobs() -> int:
    """Returns how many compilers, of 2 GiB each, the cores and the memory allow."""
    memory = int(re.findall(r'MemAvailable: +(\d+)', Path('/proc/meminfo').read_text())[0]) * 1024
    limit = Path('/sys/fs/cgroup/memory.max')
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return max(1, min(len(os.sched_getaffinity(0)), memory // (2 * 1024**3)))


def unify(source: Path) -> None:
    """Includes most of mmcv's sources into two files, and hides them from its build."""
    top = source / 'mmcv' / 'ops' / 'csrc' / 'pytorch'
    for folder, alone in ((top, ['pybind']), (top / 'cpu', ALONE)):
        files = [path for path in sorted(folder.glob('*.cpp')) if path.stem not in alone]
        hidden = [path.rename(path.with_suffix('.inc')).name for path in files]
        (folder / 'unity.cpp').write_text(''.join(f'#include "{name}"\n' for name in hidden))


def run(command: list[str], log: Path, env: dict[str, str], what: str) -> None:
    """Runs a command; its output goes to the log, ninja's count of files to the screen."""
    begin, pipe, joined = time.monotonic(), subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(command, env=env, stdout=pipe, stderr=joined, text=True)
    with log.open('a') as sink, process:
        for line in process.stdout or ():
            sink.write(line)
            if count := re.match(r'\s*\[(\d+)/(\d+)\] ', line):
                text = f'{what}: {count[1]} of {count[2]} files, {time.monotonic() - begin:.0f} s'
                print(text, end='\r' if sys.stdout.isatty() else '\n', flush=True)
    if process.returncode:
        text = log.read_text()
        for pattern, remedy in REMEDIES.items():
            if re.search(pattern, text):
                sys.exit(f'{what} failed: {remedy} (log: {log})')
        errors = [line.strip() for line in text.splitlines() if 'error' in line.lower()]
        raise RuntimeError(f'{what} failed: {[*errors, "no reason given"][0][:200]} (log: {log})')


def build(package: str, version: str, ops: str, folder: Path, unity: bool) -> Path:
    """Builds a wheel into a folder and returns it; the log lies beside it."""
    log, what = folder / 'build.log', f'{package} {version}'
    log.unlink(missing_ok=True)
    env = {'MAX_JOBS': str(compile_jobs()), **os.environ, 'MMCV_WITH_OPS': '1'}
    if ops == 'cpu':  # where torch sees a GPU, mmcv's setup.py asks for nvcc
        env.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')
    if unity:  # debug information takes half of the time; the last of contradicting flags counts
        env['CFLAGS'] = f'{env.get("CFLAGS") or sysconfig.get_config_var("CFLAGS")} -O2 -g0'
    with tempfile.TemporaryDirectory(prefix='build-', dir=folder) as work:
        own = ['--no-deps', '--no-build-isolation', '--no-binary', package]
        fetch = [*PIP, 'download', *own, '-d', work, f'{package}=={version}']
        run(fetch, log, env, f'{what}, download')
        (archive,) = Path(work).glob('*.tar.gz')
        shutil.unpack_archive(archive, work)
        source = archive.with_name(archive.name.removesuffix('.tar.gz'))
        if unity:
            unify(source)
        print(f'{what}: compiling its {ops} ops, {env["MAX_JOBS"]} at a time', flush=True)
        run([*PIP, 'wheel', '-v', *own, '-w', work, str(source)], log, env, f'{what}, {ops} ops')
        (wheel,) = Path(work).glob('*.whl')
        return wheel.replace(folder / wheel.name)


def install(wheel: Path, ops: str) -> None:
    """Installs a wheel; raises an error, and removes the file, if its ops do not work."""
    replace = ('install', '-q', '--no-deps', '--no-index', '--force-reinstall', '--no-compile')
    devices = ('cpu',) if ops == 'cpu' else ('cpu', 'cuda')
    for command in ((*PIP, *replace, str(wheel)), (sys.executable, '-c', PROBE, *devices)):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            wheel.unlink()
            why = done.stderr.strip().splitlines()[-1:] or [f'exit status {done.returncode}']
            raise RuntimeError(f'{wheel} does not work: {why[0]}')


def provide(package: str, version: str, ops: str) -> None:
    """Installs mmcv with ops that work: from the cache, or built."""
    folder = wheel_folder(package, version, torch.__version__, ops)
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob('*.whl'):
        try:
            return install(wheel, ops)
        except RuntimeError as error:
            print(f'It is built again: {error}', flush=True)
    try:
        return install(build(package, version, ops, folder, unity=ops == 'cpu'), ops)
    except RuntimeError as error:
        rest = "mmcv's own build, ten times as long" if ops == 'cpu' else 'ops for the CPU'
        print(f'Now {rest}: {error}', flush=True)
    if ops != 'cpu':
        return provide(package, version, 'cpu')
    return install(build(package, version, ops, folder, unity=False), ops)


if __name__ == '__main__':
    try:
        provide(sys.argv[1], sys.argv[2], choose_ops(os.environ.get('IDLEVIT_MM_OPS', '')))
    except (RuntimeError, OSError) as failure:
        sys.exit(f'{failure}')
